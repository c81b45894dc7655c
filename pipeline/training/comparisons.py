"""Preference data become comparisons: a prompt, two answers, and by objective which of them is better."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from pipeline.errors import ConfigurationError, RowError
from pipeline.inputs.conversations import TURN, check_text, read_conversation, split_helpsteer
from pipeline.inputs.records import RawRecord
from pipeline.inputs.rows import Unreadable
from pipeline.quoting import quote
from pipeline.records import Message
from pipeline.training.layouts import Layout, Shape, path_of
from pipeline.training.settings import PairsInputConfig, check_objective

UNREADABLE, EQUAL, PROMPTS = "a row that cannot be read", "both sides are equal", "other prompts on the two sides"
MISSING, TIE, ONE_SIDED = "a side is missing or empty", "no better side (a tie)", "a label for one side only"
NO_LABEL, ALONE, MALFORMED = "no label", "no other answer to its prompt", "not in the expected form"
TEXT_KEYS = ("response", "answer", "text", "content", "completion", "output")
FIRST = ("0", "a", "first", "model_a", "response_a", "response_0", "left")
SECOND = ("1", "b", "second", "model_b", "response_b", "response_1", "right")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its scores by objective; higher is better."""

    text: str
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to one prompt.

    Args:
        place: names the row in messages.
        file: the name of its file.
        prompt: the conversation before the answers.
        answers: both.
        labels: by objective, the index of the better one.
    """

    place: str
    file: str
    prompt: tuple[Message, ...]
    answers: tuple[Answer, Answer]
    labels: Mapping[str, int]


@dataclass(slots=True)
class Drops:
    """What was left out: how often each reason held, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str, detail: str = "") -> None:
        """Count a row or a pair."""
        self.counts[reason] += 1
        self.first.setdefault(reason, f"{place}: {detail}" if detail else place)

    def describe(self) -> list[str]:
        """One line a reason, the most frequent first."""
        counted = self.counts.most_common()
        return [f"{count:,} dropped: {reason} (first: {self.first[reason]})" for reason, count in counted]


class Dropped(RowError):
    """A row that is left out. Its arguments are the reason that is counted, and what this row holds."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_comparisons(
    records: Iterable[RawRecord], layout: Layout, config: PairsInputConfig, objective: str, drops: Drops
) -> Iterator[Comparison]:
    """Yield the comparisons of all records; what gives none is counted in `drops`.

    Args:
        records: in order.
        layout: their columns.
        config: how scored answers are paired.
        objective: of pairs that name none.
        drops: is added to.
    """
    if layout.shape is Shape.SCORED:
        yield from _compare_scored(records, layout, config, drops)
        return
    read = _read_pair if layout.shape is Shape.PAIRS else _read_named
    for record in records:
        try:
            yield read(record, layout, objective, drops)
        except Dropped as dropped:
            drops.add(dropped.reason, record.place, dropped.detail)
        except RowError as fault:
            drops.add(MALFORMED, record.place, str(fault))


def _value(record: RawRecord, column: str) -> Any:
    if record.values is None:
        raise Dropped(UNREADABLE)
    value = record.values.get(column)
    if isinstance(value, Unreadable):
        raise Dropped(UNREADABLE, f"{column} {value.reason}")
    return value


def _read_pair(record: RawRecord, layout: Layout, objective: str, drops: Drops) -> Comparison:
    prompt = None if layout.prompt is None else _read_prompt(_value(record, layout.prompt), layout.prompt)
    sides = [_read_side(_value(record, column), column, prompt) for column in layout.sides]
    (before, chosen), (other, rejected) = sides
    if before != other:
        raise Dropped(PROMPTS)
    before = _with_system(record, layout, before)
    if layout.objectives is not None:
        name = _value(record, layout.objectives)
        try:
            objective = check_objective(name) if isinstance(name, str) else ""
        except ValueError as error:
            raise Dropped(MALFORMED, str(error)) from None
        if not objective:
            raise Dropped(NO_LABEL, f"{layout.objectives} is {quote(name)}")
    answers = [Answer(chosen), Answer(rejected)]
    for at, column in enumerate(layout.side_scores or ()):
        score = _number(_value(record, column))
        answers[at] = Answer(answers[at].text, {} if score is None else {objective: score})
    return _comparison(record, before, (answers[0], answers[1]), {objective: 0})


def _read_named(record: RawRecord, layout: Layout, objective: str, drops: Drops) -> Comparison:
    assert layout.prompt is not None
    prompt = _read_prompt(_value(record, layout.prompt), layout.prompt)
    sides = [_read_side(_value(record, column), column, prompt) for column in layout.sides]
    if sides[0][0] != sides[1][0]:
        raise Dropped(PROMPTS)
    prompt = _with_system(record, layout, sides[0][0])
    labels: dict[str, int] = {}
    reasons: list[str] = []
    for name, column in layout.preferred.items():
        try:
            labels[name] = _better(_value(record, column), column, layout.sides, record.place)
        except Dropped as dropped:
            reasons.append(f"{dropped.reason} for {name}")
            if len(layout.preferred) > 1:
                drops.add(reasons[-1], record.place, dropped.detail)
            else:
                raise Dropped(reasons[-1], dropped.detail) from None
    if not labels:
        raise Dropped("no label for any objective")
    return _comparison(record, prompt, (Answer(sides[0][1]), Answer(sides[1][1])), labels)


def _comparison(
    record: RawRecord, prompt: tuple[Message, ...], answers: tuple[Answer, Answer], labels: Mapping[str, int]
) -> Comparison:
    if answers[0].text.strip() == answers[1].text.strip():
        raise Dropped(EQUAL)
    return Comparison(record.place, record.file, prompt, answers, labels)


def _better(value: Any, column: str, sides: Sequence[str], place: str) -> int:
    """The index of the better of two answers, as a label names it.

    Raises:
        Dropped: it names none.
        ConfigurationError: it is a number beyond those of two sides: then 0 and 1 mean something else, too.
    """
    if value is None or value == "" or value != value:  # the last of NaN, which stands for null in some files
        raise Dropped(NO_LABEL)
    number = _number(value)
    text = str(value).strip().lower() if number is None else f"{number:g}"
    names = [{each.lower(), *usual} for each, usual in zip(sides, (FIRST, SECOND), strict=True)]
    if isinstance(value, bool):
        raise Dropped(MALFORMED, f"{column} must be 0 or 1; got {quote(value)}")
    for index, known in enumerate(names):
        if text in known:
            return index
    if text.startswith(("tie", "both", "equal", "draw", "none", "neither")) or text == "-1":
        raise Dropped(TIE)
    if number is not None:
        raise ConfigurationError(
            f"input.preferred: {column} must name the better answer by 0 ({sides[0]}) or 1 ({sides[1]}), with -1 for "
            f"a tie; {place} has {quote(value)}, so its numbers mean something else, as 1 and 2 or degrees do. Give "
            "a column with 0, 1 and null"
        )
    raise Dropped(MALFORMED, f"{column} must name the better answer, as 0 and 1 do; got {quote(value)}")


def _read_prompt(value: Any, column: str) -> tuple[Message, ...]:
    """The conversation before the answers."""
    if value is None or (isinstance(value, str) and not value.strip()) or value == []:
        raise Dropped("the prompt is missing or empty")
    if not isinstance(value, str) or _is_conversation(value):
        messages = read_conversation(value, column)
    else:
        messages = tuple(split_helpsteer(check_text(value, column)))
    if messages[-1]["role"] == "assistant":
        raise Dropped(MALFORMED, f"the last of {column} is the assistant's; it must be the message to answer")
    return messages


def _with_system(record: RawRecord, layout: Layout, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt after the row's system message, where it has one."""
    text = None if layout.system is None else _value(record, layout.system)
    if text is None or text == "":
        return prompt
    system: Message = {"role": "system", "content": check_text(text, str(layout.system))}
    if prompt[0] == system:
        return prompt
    if prompt[0]["role"] == "system":
        raise Dropped(MALFORMED, f"the prompt has another system message than {layout.system}")
    return (system, *prompt)


def _read_side(value: Any, column: str, prompt: tuple[Message, ...] | None) -> tuple[tuple[Message, ...], str]:
    """The prompt that a side holds, or the row's, and its answer.

    A side may hold more than the row's prompt: a system message, or the turns before and after it.
    """
    if value is None or value in ("", []) or (isinstance(value, str) and not value.strip()):
        raise Dropped(MISSING)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str) and not _is_conversation(value):
        if prompt is None:
            raise Dropped(MALFORMED, f"{column} is text, and there is no column of prompts (input.prompt)")
        return prompt, check_text(value, column)
    *before, last = read_conversation(value, column)
    if last["role"] != "assistant" or "tool_calls" in last:
        raise Dropped(MISSING if last["role"] != "assistant" else MALFORMED, f"{column} ends without an answer")
    if not last["content"].strip():
        raise Dropped(MISSING)
    if not before and prompt is None:
        raise Dropped(MALFORMED, f"{column} has an answer without a prompt")
    if before and prompt is not None and not all(message in before for message in prompt):
        raise Dropped(PROMPTS, f"{column} does not hold the row's prompt")
    return tuple(before) or prompt or (), last["content"]


def _is_conversation(text: str) -> bool:
    """Whether a text is a transcript of HH-RLHF, or messages as JSON text."""
    if TURN.match(text):
        return True
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


@dataclass(slots=True)
class _Group:
    """The answers to one prompt."""

    prompt: tuple[Message, ...]
    answers: list[tuple[RawRecord, Answer]] = field(default_factory=list)


def _compare_scored(
    records: Iterable[RawRecord], layout: Layout, config: PairsInputConfig, drops: Drops
) -> Iterator[Comparison]:
    groups: dict[str, _Group] = {}
    for record in records:
        try:
            assert layout.prompt is not None
            prompt = _with_system(record, layout, _read_prompt(_value(record, layout.prompt), layout.prompt))
            answers = list(_read_answers(record, layout, drops))
        except Dropped as dropped:
            drops.add(dropped.reason, record.place, dropped.detail)
            continue
        except RowError as fault:
            drops.add(MALFORMED, record.place, str(fault))
            continue
        key = json.dumps(prompt, sort_keys=True)
        groups.setdefault(key, _Group(prompt)).answers += [(record, answer) for answer in answers]
    for group in groups.values():
        if len(group.answers) < 2:
            for record, _ in group.answers:
                drops.add(ALONE, record.place)
            continue
        yield from _pair(group, layout, config, drops)


def _read_answers(record: RawRecord, layout: Layout, drops: Drops) -> Iterator[Answer]:
    """The answers of a record with the scores that they have."""
    if layout.answers is None:
        assert layout.response is not None
        text = _read_text(_value(record, layout.response), layout.response)
        yield Answer(text, _read_scores(record.values or {}, layout, record.place))
        return
    listed = _value(record, layout.answers)
    if isinstance(listed, str):
        try:
            listed = json.loads(listed)
        except (ValueError, RecursionError):
            listed = None
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise Dropped(MALFORMED, f"{layout.answers} must be a list of objects")
    keys = (layout.response,) if layout.response else TEXT_KEYS
    for at, each in enumerate(listed):
        key = next((key for key in keys if key in each), keys[0])
        try:
            text = _read_text(each.get(key), f"{layout.answers}[{at}].{key}")
        except RowError as fault:
            drops.add(getattr(fault, "reason", MALFORMED), record.place)
            continue
        yield Answer(text, _read_scores(each, layout, record.place))


def _read_text(value: Any, column: str) -> str:
    """The text of a scored answer, whose prompt is the row's."""
    before, text = _read_side(value, column, ())
    if before:
        raise Dropped(PROMPTS, f"{column} holds a conversation; it must hold an answer to the row's prompt")
    return text


def _read_scores(values: Mapping[str, Any], layout: Layout, place: str) -> dict[str, float]:
    """The scores by objective, higher better, true above false; those that are no finite number are left out."""
    scores = {}
    for name, path in layout.scores.items():
        parts, sign = path_of(path)
        value: Any = values
        for part in parts:
            value = value.get(part) if isinstance(value, Mapping) else None
        if (number := float(value) if isinstance(value, bool) else _number(value)) is not None:
            scores[name] = sign * number
    return scores


def _number(value: Any) -> float | None:
    """A finite number, of text too; None for anything else."""
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _pair(group: _Group, layout: Layout, config: PairsInputConfig, drops: Drops) -> Iterator[Comparison]:
    """Pair the answers to one prompt, for each objective the widest margins first; one comparison for two answers."""
    labels: dict[tuple[int, int], dict[str, int]] = {}
    for name in layout.scores:
        margins: list[tuple[float, int, int]] = []
        for (low, (record, one)), (high, (_, other)) in combinations(enumerate(group.answers), 2):
            found = [each.scores.get(name) for each in (one, other)]
            if found[0] is None or found[1] is None:
                reason = NO_LABEL if found[0] is found[1] else ONE_SIDED
                drops.add(f"{reason} for {name}", record.place)
            elif one.text.strip() == other.text.strip():
                drops.add(EQUAL, record.place)
            elif found[0] == found[1]:
                drops.add(f"{TIE} for {name}", record.place)
            elif abs(found[0] - found[1]) < config.min_margin:
                drops.add(f"less than input.min_margin apart for {name}", record.place)
            else:
                margins.append((found[0] - found[1], low, high))
        margins.sort(key=lambda each: -abs(each[0]))
        for margin, low, high in margins[: config.max_pairs]:
            labels.setdefault((low, high), {})[name] = int(margin < 0)
        for _, low, _ in margins[config.max_pairs :]:
            drops.add("more than input.max_pairs of its prompt", group.answers[low][0].place)
    for (low, high), found_labels in sorted(labels.items()):
        (record, one), (_, other) = group.answers[low], group.answers[high]
        yield Comparison(record.place, record.file, group.prompt, (one, other), found_labels)
