"""The Python interface: an aligned model in this process, for scripts, notebooks and data pipelines of one's own."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from os import PathLike
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, TypeVar, overload

import numpy as np

from pipeline.config.files import load_config, parse_config
from pipeline.config.sections import Config
from pipeline.engine.decoding import DecodingEngine
from pipeline.engine.engine import decode_rows
from pipeline.errors import ConfigurationError, RowError
from pipeline.evaluation.text_principals import resolve_judge_principals
from pipeline.hub.embedded import default_cache_folder
from pipeline.inputs.batch_bodies import TEMPLATE_KWARGS
from pipeline.inputs.rows import TOOLS, InputColumns, make_row, read_id
from pipeline.protocol.hosts import Hosts
from pipeline.records import Message, Proposal, Record, Row, TokenTrace
from pipeline.runtime.assembly import Assembly, assemble
from pipeline.runtime.engines import make_decoding_engine
from pipeline.runtime.local_hosts import start_hosts

Conversation = str | Sequence[Message]
ModelName = str | PathLike[str]
Weights = Mapping[str, float]
T = TypeVar("T")
MODEL_KEYS = ("model", "reference")
OF_ROWS = (TOOLS, TEMPLATE_KWARGS)  # columns of a batch that are read as those of an input file
ADDED = (
    "response", "reasoning", "finish_reason", "num_tokens", "rewards", "payments", "kl_per_token", "error",
)  # fmt: skip
NOTHING: Mapping[str, Sequence[Any]] = MappingProxyType({})
NOWHERE = "none"  # an aligner reads no input and writes no output


@dataclass(frozen=True, slots=True)
class AlignedAnswer:
    """An answer to one prompt.

    Attributes:
        text: the answer; None where there is an error.
        reasoning: what the model wrote before the answer; None where it wrote none.
        num_tokens: tokens drawn, reasoning and end token included.
        finish_reason: "stop", "length" (cut at max_new_tokens), "reasoning" (ended in its reasoning, with an empty
            text) or "error".
        rewards: by principal, the sum of q over the answer in nats, before weights.
        payments: by principal, nats paid for the answer's tokens; None under a rule without payments.
        kl_per_token: KL divergence to the base, in nats per token; None with trace "none".
        error: why there is no answer.
        tokens: with trace "tokens", every drawn token with its log-probabilities and payments.
        proposals: with unit "block" or "answer", what each game was about and what was chosen.
    """

    text: str | None
    num_tokens: int
    finish_reason: str
    rewards: Mapping[str, float | None]
    payments: Mapping[str, float | None]
    kl_per_token: float | None
    error: str | None
    tokens: tuple[TokenTrace, ...]
    reasoning: str | None = None
    proposals: tuple[Proposal, ...] = ()

    @classmethod
    def of(cls, record: Record) -> AlignedAnswer:
        """The answer that a record holds."""
        return cls(
            record.response,
            record.num_tokens,
            str(record.finish_reason),
            record.rewards,
            record.payments,
            record.kl_per_token,
            record.error,
            record.tokens,
            record.reasoning,
            record.proposals,
        )


class Aligner:
    """A base model steered by principals, in this process. Loads its models when it is created.

    Answers equal those of `cage relabel` to the bit, for the same settings and ids: draws are keyed by seed, id and
    sample. Use it as a context manager, or call `close`, to release the models.

    Args:
        model: the base: a folder (as text or a path), a hub id, an s3:// folder or "smollm2-135m"; or a mapping with
            the keys of `base` in a configuration file.
        principals: by name, each a mapping with the keys of a configuration file: kind, weight, ...
        slots: prompts answered at once, or "auto": as many as there is memory for.
        device: of every model that names none: "auto", "cpu" or "cuda".
        dtype: of every model that names none: "auto", "float32", "bfloat16" or "float16".
        reproducibility: "strict": a row's numbers do not depend on the others; "relaxed": faster on some machines.
        cache_folder: where models from elsewhere are kept; None: CAGE_CACHE, else the user's cache folder.
        progress: whether loading and answering are reported on the standard error.
        decoding: the keys of `decoding` in a configuration file: rule, agent_temperature, candidates, temperature,
            max_new_tokens, seed, stop, trace, n, ...

    Raises:
        ConfigurationError: a key, a value or a model cannot be used.
    """

    def __init__(
        self,
        model: ModelName | Mapping[str, Any],
        principals: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        slots: int | Literal["auto"] = 16,
        device: str = "auto",
        dtype: str = "auto",
        reproducibility: str = "strict",
        cache_folder: str | Path | None = None,
        progress: bool = False,
        **decoding: Any,
    ) -> None:
        if not isinstance(principals, Mapping | None):
            raise ConfigurationError(f"principals must be a mapping of sections by name; got {principals!r:.200}")
        placed = {"device": device, "dtype": dtype}
        config = parse_config(
            {
                "input": {"path": NOWHERE},
                "output": {"path": NOWHERE},
                "base": _placed(model, placed),
                "principals": {
                    name: _placed_models(each, placed) if isinstance(each, Mapping) else each
                    for name, each in (principals or {}).items()
                },
                "decoding": {"reproducibility": reproducibility, **decoding},
                "cluster": {"transport": "local", "slots": slots},
            },
            source="Aligner",
        )
        self._start(config, cache_folder, progress=progress)

    @classmethod
    def from_config(
        cls,
        file: str | Path,
        overrides: Sequence[str] = (),
        *,
        cache_folder: str | Path | None = None,
        progress: bool = False,
    ) -> Aligner:
        """Load an aligner with the base, principals, decoding and slots of a configuration file.

        The file's input, output and the rest of its cluster section have no effect here.

        Args:
            file: the YAML file.
            overrides: such as "decoding.temperature=0.7".
            cache_folder: as in the class.
            progress: as in the class.

        Raises:
            ConfigurationError: the file cannot be used, or it has a grid, which asks for several ways to answer.
        """
        config = load_config(file, list(overrides))
        aligner = cls.__new__(cls)
        aligner._start(config, cache_folder, progress=progress)
        return aligner

    def _start(self, config: Config, cache_folder: str | Path | None, *, progress: bool) -> None:
        if not config.grid.is_empty:
            raise ConfigurationError(
                "an aligner answers in one way: a configuration with a grid is for cage evaluate"
            )
        self._progress = progress
        self._num_samples = config.decoding.n
        self._hosts: Hosts | None = None
        self._engine: DecodingEngine | None = None
        folder = default_cache_folder(os.environ) if cache_folder is None else Path(cache_folder)
        scorers = resolve_judge_principals(config, folder, progress=self._report)
        self._assembly: Assembly = replace(assemble(config, folder, progress=self._report), scorers=scorers)
        self._hosts = start_hosts(self._assembly)

    @overload
    def generate(
        self,
        prompts: Sequence[Conversation],
        *,
        ids: Sequence[str] | None = ...,
        weights: Weights | Sequence[Weights | None] | None = ...,
        n: Literal[1] | None = ...,
    ) -> list[AlignedAnswer]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Conversation],
        *,
        ids: Sequence[str] | None = ...,
        weights: Weights | Sequence[Weights | None] | None = ...,
        n: int,
    ) -> list[AlignedAnswer] | list[list[AlignedAnswer]]: ...

    def generate(
        self,
        prompts: Sequence[Conversation],
        *,
        ids: Sequence[str] | None = None,
        weights: Weights | Sequence[Weights | None] | None = None,
        n: int | None = None,
    ) -> list[AlignedAnswer] | list[list[AlignedAnswer]]:
        """Answer every prompt; one that fails has `error`, and the others go on.

        Args:
            prompts: texts, or conversations as lists (also tuples and arrays) of {"role": ..., "content": ...}.
            ids: of the prompts, which key their draws; by default "0", "1", and so on.
            weights: preference weights by principal, for all prompts or one mapping per prompt. Principals that are
                left out keep their configured weight.
            n: samples per prompt; None: as many as `decoding.n` says, which is 1 where nothing says otherwise.

        Returns:
            One answer per prompt, in order; lists of n answers where n > 1.

        Raises:
            ConfigurationError: the arguments do not fit together, or the aligner is closed.
            CageError: a model's host failed; the aligner can be used again.
        """
        n = self._num_samples if n is None else n
        if n < 1:
            raise ConfigurationError(f"n must be at least 1; got {n}")
        answers = self._answer(self._rows(_listed(prompts, "prompts"), ids=ids, weights=weights), n)
        return answers if n > 1 else [each for (each,) in answers]

    def _answer(self, rows: Sequence[Row], n: int) -> list[list[AlignedAnswer]]:
        """The n answers to each row, in order."""
        records: dict[tuple[str, int], Record] = {}
        with self._engine_in_use() as engine:
            for record in self._shown(decode_rows(engine, rows, num_samples=n), len(rows) * n):
                records[record.row_id, record.sample] = record
        return [[AlignedAnswer.of(records[row.row_id, sample]) for sample in range(n)] for row in rows]

    def score(self, prompts: Sequence[Conversation], answers: Sequence[str]) -> list[dict[str, float]]:
        """Compute the rewards of existing answers by teacher forcing; the token that ends an answer is included.

        Args:
            prompts: as in `generate`.
            answers: one text per prompt.

        Returns:
            For each prompt, in order, the rewards by principal: the sum of q over the answer in nats, before weights.

        Raises:
            ConfigurationError: a prompt or its answer cannot be scored (the message says which), or the aligner is
                closed.
            CageError: a model's host failed; the aligner can be used again.
        """
        prompts, answers = _listed(prompts, "prompts"), _listed(answers, "answers")
        if len(answers) != len(prompts):
            raise ConfigurationError(f"score takes one answer per prompt; got {len(prompts)} and {len(answers)}")
        rows = self._rows(prompts, answers=answers)
        with self._engine_in_use() as engine:
            rewards = []
            for index, row in enumerate(self._shown(iter(rows), len(rows))):
                try:
                    rewards.append(engine.score(row))
                except RowError as error:
                    raise ConfigurationError(f"prompt {index} and its answer cannot be scored: {error}") from None
            return rewards

    def close(self) -> None:
        """Release the models. The aligner cannot be used afterwards; a second call does nothing."""
        self._hosts = self._engine = None
        gc.collect()

    def __enter__(self) -> Aligner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _engine_in_use(self) -> Iterator[DecodingEngine]:
        """The engine. A call that fails leaves rows in it, so the next call starts with a new engine."""
        if self._hosts is None:
            raise ConfigurationError("this aligner is closed")
        engine, self._engine = self._engine, None
        if engine is None:
            engine = make_decoding_engine(self._assembly, self._hosts)
            # the hosts may still hold rows of the engine that failed, or fewer slots, if it had halved them
            engine.resize()
        yield engine
        self._engine = engine

    def _rows(
        self,
        prompts: Sequence[Conversation],
        *,
        ids: Sequence[str] | None = None,
        weights: Weights | Sequence[Weights | None] | None = None,
        answers: Sequence[str] | None = None,
        more: Mapping[str, Sequence[Any]] = NOTHING,
    ) -> list[Row]:
        """The prompts as rows, read as an input file's are; `more` has values of the columns `OF_ROWS`."""
        row_ids = [str(index) for index in range(len(prompts))] if ids is None else [_read_id(each) for each in ids]
        if len(row_ids) != len(prompts) or len(set(row_ids)) != len(row_ids):
            raise ConfigurationError(f"ids must be one per prompt and all different; got {row_ids!r:.200}")
        own = [weights] * len(prompts) if weights is None or isinstance(weights, Mapping) else list(weights)
        if len(own) != len(prompts):
            raise ConfigurationError(f"weights must be one mapping, or one per prompt; got {len(own)}")
        names = tuple(principal.name for principal in self._assembly.topology.principals)
        texts: Sequence[str | None] = [None] * len(prompts) if answers is None else answers
        return [
            _row(prompt, row_id, each, text, names, {name: _plain(values[at]) for name, values in more.items()})
            for at, (prompt, row_id, each, text) in enumerate(zip(prompts, row_ids, own, texts, strict=True))
        ]

    def _shown(self, items: Iterator[T], total: int) -> Iterator[T]:
        """The items, with a progress bar where one is wanted."""
        if not self._progress:
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, total=total, console=Console(stderr=True), description="answers")

    def _report(self, line: str) -> None:
        if self._progress:
            print(line, file=sys.stderr, flush=True)


class AlignBatch:
    """A callable class for `ray.data.Dataset.map_batches`: one aligner in each actor.

    A batch needs a column `id` and a column `prompt` (texts or conversations) or `messages` (conversations), and may
    have `weights`, `chat_template_kwargs` and, beside `messages`, `tools`. Ids must differ between all rows of the
    dataset: they key the draws, so an answer does not depend on how rows are put into batches. The columns response,
    reasoning, finish_reason, num_tokens, rewards, payments, kl_per_token and error are added; a batch that has one of
    them is refused.

    Args:
        model: as in `Aligner`.
        principals: as in `Aligner`.
        options: the other arguments of `Aligner`.

    Raises:
        ConfigurationError: a key, a value or a model cannot be used.
    """

    def __init__(
        self,
        model: ModelName | Mapping[str, Any],
        principals: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        if options.get("n", 1) != 1:
            raise ConfigurationError(f"a row of a batch gets one answer, so n must be 1; got {options['n']!r}")
        self._aligner = Aligner(model, principals, **options)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a batch.

        Args:
            batch: columns by name.

        Returns:
            The batch with the columns of its answers.

        Raises:
            ConfigurationError: the batch has no prompts, no ids, the same id twice, or a column that would be added.
            CageError: a model's host failed.
        """
        if ("prompt" in batch) == ("messages" in batch):
            raise ConfigurationError(f"a batch needs a column prompt or messages; it has {', '.join(batch)}")
        if "id" not in batch:
            # numbers within the batch would give the same draws to the rows at the same place of all batches
            raise ConfigurationError(
                "a batch needs a column id: an id keys the draws of its row, and the place in a batch would repeat "
                f"from batch to batch; it has {', '.join(batch)}"
            )
        if taken := [name for name in ADDED if name in batch]:
            raise ConfigurationError(
                f"a batch has the column {', '.join(taken)}, and answers would take its place; rename or drop it"
            )
        prompts = batch["prompt" if "prompt" in batch else "messages"]
        if (
            "messages" in batch
            and (text := next((each for each in prompts if isinstance(each, str)), None)) is not None
        ):
            raise ConfigurationError(
                f"the column messages must hold lists of messages; got the text {text!r:.200} (texts are for prompt)"
            )
        weights = (
            [dict(each) if each is not None else None for each in batch["weights"]] if "weights" in batch else None
        )
        more = {name: batch[name] for name in OF_ROWS if name in batch and (name != TOOLS or "messages" in batch)}
        rows = self._aligner._rows(_listed(prompts, "prompts"), ids=batch["id"], weights=weights, more=more)
        return {**batch, **_columns([answer for (answer,) in self._aligner._answer(rows, 1)])}


def _columns(answers: Sequence[AlignedAnswer]) -> dict[str, list[Any]]:
    """The columns that answers add to a batch."""
    return {
        "response": [answer.text for answer in answers],
        "reasoning": [answer.reasoning for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
        "num_tokens": [answer.num_tokens for answer in answers],
        "rewards": [dict(answer.rewards) for answer in answers],
        "payments": [dict(answer.payments) for answer in answers],
        "kl_per_token": [answer.kl_per_token for answer in answers],
        "error": [answer.error for answer in answers],
    }


def _listed(values: Iterable[T], name: str) -> list[T]:
    """The prompts or the answers as a list. A text and a mapping would be read by character and by key."""
    if isinstance(values, str | Mapping):
        what = "texts" if name == "answers" else "texts or conversations"
        raise ConfigurationError(f"{name} must be a list of {what}; got {values!r:.200}")
    return list(values)


def _read_id(value: Any) -> str:
    """An id as text. Numbers of numpy, which batches of Ray Data have, are whole numbers, too."""
    found = read_id(int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value)
    if found is None:
        raise ConfigurationError(f"ids must be text or whole numbers; got {value!r:.200}")
    return found


def _plain(value: Any) -> Any:
    """A value with lists in place of the arrays and tuples in it."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    return value


def _placed(value: Any, placed: Mapping[str, str]) -> Any:
    """A model's section, with the device and the dtype of the aligner where it names none."""
    value = _path_text(value)
    if isinstance(value, str) and value not in ("backbone", "none"):
        value = {"model": value}
    if not isinstance(value, Mapping):
        return value
    return {**placed, **{key: _path_text(each) for key, each in value.items()}}


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, PathLike) else value


def _placed_models(section: Mapping[str, Any], placed: Mapping[str, str]) -> dict[str, Any]:
    """A principal's section with its models placed, those of its terms included."""
    found = {
        key: _placed(value, placed) if key in MODEL_KEYS else _path_text(value) for key, value in section.items()
    }
    if isinstance(terms := found.get("terms"), Mapping):
        found["terms"] = {
            name: _placed_models(term, placed) if isinstance(term, Mapping) else term for name, term in terms.items()
        }
    return found


def _row(
    prompt: Any,
    row_id: str,
    weights: Weights | None,
    answer: str | None,
    names: Sequence[str],
    more: Mapping[str, Any],
) -> Row:
    columns = InputColumns(
        prompt="prompt",
        weights="weights",
        response="response",
        tools=TOOLS,
        has_tools=True,
        template_kwargs=TEMPLATE_KWARGS,
    )
    record = {
        **more,
        "prompt": _plain(prompt),
        "weights": None if weights is None else dict(weights),
        "response": answer,
    }
    return make_row(record, columns, row_id=row_id, place=f"prompt {row_id}", principal_names=names)
