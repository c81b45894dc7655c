"""The data of a training: preference data read, encoded as the pipeline decodes, and split by prompt."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ConfigurationError, RowError
from pipeline.inputs.records import RecordFiles, open_records
from pipeline.records import Message
from pipeline.stores.store import open_store
from pipeline.training.comparisons import Comparison, Drops, read_comparisons
from pipeline.training.layouts import Layout, Shape, choose_layout
from pipeline.training.processes import ALONE, Processes
from pipeline.training.returns import score_comparisons
from pipeline.training.settings import OBJECTIVE, Loss, PairsInputConfig, TrainConfig

DATASET = "_dataset/"  # of a run of `cage synthesize`
PREFERENCES, MANIFEST = "preferences", "manifest.json"
HELD_OUT_FILES = "validation-"  # how the names of files begin that such a data set holds out itself
MANY = 20  # comparisons from which on labels that never differ are worth a note

Encode = Callable[[Sequence[Message], Sequence[str]], tuple[list[int], list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Preferences:
    """Preference data that were found and not read yet.

    Args:
        records: the rows.
        layout: their columns.
        objective: of pairs that name none.
        has_splits: whether the files say which pairs are held out.
    """

    records: RecordFiles
    layout: Layout
    objective: str
    has_splits: bool


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A comparison as token ids.

    Args:
        comparison: what it was.
        prompt_ids: up to where the answer begins.
        answer_ids: of both answers, the end of the turn included.
    """

    comparison: Comparison
    prompt_ids: list[int]
    answer_ids: tuple[list[int], list[int]]

    @property
    def num_tokens(self) -> int:
        """Of the longer one."""
        return len(self.prompt_ids) + max(map(len, self.answer_ids))


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The pairs of all objectives.

    Args:
        objectives: in order.
        train, held_out: no prompt is in both.
        drops: what was left out.
        notes: what looks wrong about labels and answers.
    """

    objectives: tuple[str, ...]
    train: tuple[EncodedPair, ...]
    held_out: tuple[EncodedPair, ...]
    drops: Drops
    notes: tuple[str, ...] = field(default=())

    def of(self, objective: str) -> tuple[list[EncodedPair], list[EncodedPair]]:
        """The pairs that have a label for an objective: for training, and held out."""
        return (
            [pair for pair in self.train if objective in pair.comparison.labels],
            [pair for pair in self.held_out if objective in pair.comparison.labels],
        )


def open_preferences(config: PairsInputConfig) -> Preferences:
    """Find the data and their columns. A run of `cage synthesize` stands for the preferences that it made.

    Raises:
        ConfigurationError: there are none, or a column is missing.
    """
    path, objective, has_splits = config.path, OBJECTIVE, False
    if (made := _synthesized(config.path)) is not None:
        path, objective, has_splits = *made, True
    records = open_records(path, split=config.split, subset=config.subset, limit=config.limit)
    layout = choose_layout(config, records.column_names)
    return Preferences(records, layout, config.objective or objective, has_splits)


def read_data(
    found: Preferences,
    config: TrainConfig,
    encode: Encode,
    cache_folder: Path = Path(),
    processes: Processes = ALONE,
) -> TrainingData:
    """Read and encode all pairs, and hold out some prompts.

    Args:
        found: the data.
        config: names objectives, the longest pair and the share of prompts that is held out.
        encode: gives the token ids of a prompt and of answers to it; raises RowError.
        cache_folder: where the weights of a judge are kept that are fetched.
        processes: that train together; the main one alone asks a judge.

    Raises:
        ConfigurationError: an objective is unknown, or has no pair to train on or to hold out.
    """
    drops = Drops()
    comparisons = list(
        read_comparisons(found.records.read(found.layout.columns), found.layout, config.input, found.objective, drops)
    )
    if config.training.judge is not None:
        judge = config.training.judge
        name = config.input.objective or str(judge.kind)
        comparisons = score_comparisons(comparisons, judge, name, cache_folder, drops, processes)
    objectives = _choose_objectives(comparisons, found, config, drops)
    wanted = [each for each in comparisons if any(name in objectives for name in each.labels)]
    pairs = list(_encode_all(wanted, encode, config.training.max_length, drops))
    held_out = _held_out_prompts(pairs, found, config)
    parts: tuple[list[EncodedPair], list[EncodedPair]] = ([], [])
    for pair in pairs:
        parts[_key(pair.comparison.prompt) in held_out].append(pair)
    data = TrainingData(objectives, tuple(parts[0]), tuple(parts[1]), drops, tuple(_notes(comparisons, found)))
    _refuse_empty(data, config)
    return data


def _synthesized(path: str) -> tuple[str, str] | None:
    """The folder of the preferences of a run of `cage synthesize`, or of its data set, and what scored them."""
    if Path(path).is_file():
        return None
    store = open_store(path)
    for folder in (DATASET, ""):
        text = store.read(folder + MANIFEST)
        if text is None:
            continue
        try:
            score = json.loads(text)["source"]["synthesis.score"]
        except (ValueError, KeyError, TypeError):
            continue
        names = store.names(f"{folder}{PREFERENCES}/")
        if not names:
            raise ConfigurationError(
                f"input.path: the data set of {path} has no preferences; add them to synthesis.write"
            )
        return f"{store.path}/{folder}{PREFERENCES}", str(score)
    return None


def _choose_objectives(
    comparisons: Iterable[Comparison], found: Preferences, config: TrainConfig, drops: Drops
) -> tuple[str, ...]:
    labelled = dict.fromkeys(name for each in comparisons for name in each.labels)
    listed = dict.fromkeys([*found.layout.preferred, *found.layout.scores])
    known = tuple(name for name in listed if name in labelled) or tuple(labelled)
    wanted = config.training.objectives or known
    if not known:
        raise ConfigurationError(f"no pair is left of {found.records.num_rows:,} rows: " + _reasons(drops))
    if unknown := [name for name in wanted if name not in (*known, *listed)]:
        raise ConfigurationError(
            f"training.objectives: the data have no objective {', '.join(unknown)}; they have {', '.join(known)}"
        )
    return wanted


def _encode_all(
    comparisons: Iterable[Comparison], encode: Encode, max_length: int, drops: Drops
) -> Iterable[EncodedPair]:
    for each in comparisons:
        try:
            prompt_ids, (first, second) = encode(each.prompt, [answer.text for answer in each.answers])
        except RowError as fault:
            drops.add("the model cannot read it", each.place, str(fault))
            continue
        pair = EncodedPair(each, prompt_ids, (first, second))
        if pair.num_tokens > max_length:
            drops.add(f"longer than training.max_length, {max_length:,} tokens", each.place)
        elif first == second:
            drops.add("both sides have the same tokens", each.place)
        else:
            yield pair


def _held_out_prompts(pairs: Sequence[EncodedPair], found: Preferences, config: TrainConfig) -> set[str]:
    """The keys of the prompts that are held out: a share of them by their hash, or those of the data's own split."""
    if found.has_splits:
        own = {_key(pair.comparison.prompt) for pair in pairs if pair.comparison.file.startswith(HELD_OUT_FILES)}
        if own:
            return own
    share, seed = config.training.validation, config.training.seed
    keys = {_key(pair.comparison.prompt) for pair in pairs}
    ordered = sorted(keys, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    return set(ordered[: math.ceil(share * len(ordered))])


def _key(prompt: Sequence[Message]) -> str:
    """Equal for prompts that are the same to a model: templates often drop blanks around a message."""
    return json.dumps([{**each, "content": str(each["content"]).strip()} for each in prompt], sort_keys=True)


def _notes(comparisons: Sequence[Comparison], found: Preferences) -> Iterable[str]:
    """What looks wrong: labels that are the same in every row, and answers that repeat their prompts."""
    repeating = sum(map(_repeats_prompt, comparisons))
    if len(comparisons) >= MANY and repeating > len(comparisons) / 2:
        yield (
            f"both answers of {repeating:,} of {len(comparisons):,} pairs begin with their prompt, which is then "
            "read twice; give the answers alone"
        )
    if found.layout.shape is not Shape.NAMED:
        return
    for name, column in found.layout.preferred.items():
        labels = [each.labels[name] for each in comparisons if name in each.labels]
        if len(labels) >= MANY and len(set(labels)) == 1:
            side = found.layout.sides[labels[0]]
            yield (
                f"{column} names {side} in all {len(labels):,} rows, which is more often a wrong column than a "
                f"finding about {name}"
            )


def _repeats_prompt(comparison: Comparison) -> bool:
    asked = str(comparison.prompt[-1]["content"]).strip()
    return all(answer.text.lstrip().startswith(asked) for answer in comparison.answers)


def _refuse_empty(data: TrainingData, config: TrainConfig) -> None:
    for name in data.objectives:
        train, held_out = data.of(name)
        if config.training.loss is Loss.VALUE:
            _check_returns(data, name)
        if not train and not held_out:
            raise ConfigurationError(f"no pair is left for {name}: {_reasons(data.drops)}")
        if not train:
            raise ConfigurationError(
                f"all {len(held_out):,} pairs of {name} are held out, because they have one prompt; give pairs of "
                "more prompts, or set training.validation to 0"
            )
        if not held_out and config.training.validation:
            raise ConfigurationError(
                f"no pair of {name} is held out: {len(train):,} pairs are left, of too few prompts; raise "
                "training.validation, or set it to 0 to train without a check"
            )


def _check_returns(data: TrainingData, name: str) -> None:
    """Refuse returns that teach a value head nothing, and count the answers that have none."""
    for part, is_trained in zip(data.of(name), (True, False), strict=True):
        answers = [(pair.comparison.place, answer) for pair in part for answer in pair.comparison.answers]
        returns = {answer.scores[name] for _, answer in answers if name in answer.scores}
        if part and not returns:
            raise ConfigurationError(
                f"loss: value needs a score of every answer, and those of {name} have none: give input.scores, "
                "columns score_chosen and score_rejected, or training.judge"
            )
        for place, answer in answers:
            if name not in answer.scores:
                data.drops.add(f"an answer without a score for {name}", place)
        if is_trained and len(returns) == 1:
            raise ConfigurationError(
                f"all answers of {name} have the score {returns.pop():g}: no value can be learned"
            )


def _reasons(drops: Drops) -> str:
    return "; ".join(drops.describe()) or "there are none"


def num_labels(pairs: Iterable[EncodedPair]) -> Mapping[str, int]:
    """How many pairs have a label, by objective."""
    counts: dict[str, int] = {}
    for pair in pairs:
        for name in pair.comparison.labels:
            counts[name] = counts.get(name, 0) + 1
    return counts


def digest_of_scores(data: TrainingData) -> str:
    """Equal where a training has the same answers with the same scores, in the same order."""
    digest = hashlib.sha256()
    for pair in (*data.train, *data.held_out):
        scores = [sorted(answer.scores.items()) for answer in pair.comparison.answers]
        digest.update(f"{pair.comparison.place} {pair.answer_ids} {scores}\n".encode())
    return digest.hexdigest()
