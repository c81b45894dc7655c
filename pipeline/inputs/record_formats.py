"""Formats of data sets that are recognised by their columns, and how a record of each becomes a conversation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RowError
from pipeline.inputs.conversations import check_text, read_conversation, split_helpsteer
from pipeline.quoting import quote
from pipeline.records import Message

Read = tuple[Sequence[Message], str | None]  # the conversation, and an existing answer that is not part of it


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """A format that is recognised.

    Args:
        name: as in `input.format`.
        columns: by all of these it is recognised.
        read: makes the conversation and the existing answer of a record; raises RowError.
        uses: the columns that are read; those of them that an input lacks are left out.
        answer: what is the existing answer, in words.
        yields_to_prompt: whether a column messages or prompt comes first.
    """

    name: str
    columns: frozenset[str]
    read: Callable[[Mapping[str, Any]], Read]
    uses: tuple[str, ...]
    answer: str
    yields_to_prompt: bool = False

    def is_in(self, names: Sequence[str]) -> bool:
        """Whether the columns `names` are those of the format."""
        return self.columns <= set(names) and not (self.yields_to_prompt and {"messages", "prompt"} & set(names))


def find_format(names: Sequence[str]) -> RecordFormat | None:
    """The first format that has these columns."""
    return next((each for each in FORMATS if each.is_in(names)), None)


def _text(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is None:
        raise RowError(f"{column} is null" if column in record else f"there is no {column}")
    text = check_text(value, column)
    if not text.strip():
        raise RowError(f"{column} is empty")
    return text


def _answer(record: Mapping[str, Any], column: str) -> str | None:
    value = record.get(column)
    return None if value is None else check_text(value, column)


def _system(record: Mapping[str, Any]) -> list[Message]:
    system = _answer(record, "system")
    return [{"role": "system", "content": system}] if system and system.strip() else []


def _read_sharegpt(record: Mapping[str, Any]) -> Read:
    if "conversations" not in record:
        raise RowError("there is no conversations")
    return [*_system(record), *read_conversation(record["conversations"], "conversations")], None


def _read_alpaca(record: Mapping[str, Any]) -> Read:
    instruction, context = _text(record, "instruction"), _answer(record, "input")
    text = f"{instruction}\n\n{context}" if context and context.strip() else instruction
    return [*_system(record), *_history(record), {"role": "user", "content": text}], _answer(record, "output")


def _history(record: Mapping[str, Any]) -> list[Message]:
    """Earlier turns as pairs of what the user and the assistant said."""
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RowError(f"history must be a list of pairs of texts; got {quote(pairs)}")
    return [
        {"role": role, "content": check_text(said, f"history[{at}]")}
        for at, pair in enumerate(pairs)
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def _read_pairs(record: Mapping[str, Any]) -> Read:
    """Preference pairs whose prompt is a part of both: transcripts, or lists of messages."""
    if "chosen" not in record:
        raise RowError("there is no chosen")
    return read_conversation(record["chosen"], "chosen"), None


def _read_scored_pairs(record: Mapping[str, Any]) -> Read:
    """Scored pairs: `chosen` is a conversation, or the answer to `prompt` alone."""
    value = record.get("chosen")
    if isinstance(value, str) and not value.lstrip().startswith("[") and not value.startswith("\n\nHuman:"):
        return [{"role": "user", "content": _text(record, "prompt")}], check_text(value, "chosen")
    return read_conversation(value, "chosen"), None


def _read_completions(record: Mapping[str, Any]) -> Read:
    """UltraFeedback with all completions: the one with the highest overall score is the existing answer."""
    completions = record.get("completions") or []
    if not isinstance(completions, list) or not all(isinstance(each, dict) for each in completions):
        raise RowError(f"completions must be a list of objects; got {quote(completions)}")
    scored = [each for each in completions if each.get("response") is not None and _score(each) > -math.inf]
    best = max(scored, key=_score, default=None)
    answer = None if best is None else check_text(best["response"], "completions.response")
    return [{"role": "user", "content": _text(record, "instruction")}], answer


def _score(completion: Mapping[str, Any]) -> float:
    score = completion.get("overall_score")
    is_number = isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score)
    return float(score) if is_number and score is not None else -math.inf


def _read_helpsteer(record: Mapping[str, Any]) -> Read:
    return split_helpsteer(_text(record, "prompt")), _answer(record, "response")


def _read_safe_rlhf(record: Mapping[str, Any]) -> Read:
    better = record.get("better_response_id")
    if isinstance(better, bool) or str(better) not in ("0", "1"):  # text in CSV
        raise RowError(f"better_response_id must be 0 or 1; got {quote(better)}")
    return [{"role": "user", "content": _text(record, "prompt")}], _answer(record, f"response_{better}")


FORMATS = (
    RecordFormat(
        "ultrafeedback",
        frozenset({"instruction", "completions"}),
        _read_completions,
        ("instruction", "completions"),
        "the completion with the highest overall_score",
    ),
    RecordFormat(
        "ultrafeedback-binarized",
        frozenset({"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}),
        _read_scored_pairs,
        ("prompt", "chosen"),
        "the last message of chosen",
    ),
    RecordFormat(
        "ultrafeedback-preferences",
        frozenset({"prompt", "chosen", "rejected", "chosen-rating", "rejected-rating"}),
        _read_scored_pairs,
        ("prompt", "chosen"),
        "the last message of chosen",
    ),
    RecordFormat(
        "helpsteer2",
        frozenset({"prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"}),
        _read_helpsteer,
        ("prompt", "response"),
        "response",
    ),
    RecordFormat(
        "pku-saferlhf",
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        _read_safe_rlhf,
        ("prompt", "response_0", "response_1", "better_response_id"),
        "the response that better_response_id names",
    ),
    RecordFormat(
        "sharegpt",
        frozenset({"conversations"}),
        _read_sharegpt,
        ("conversations", "system"),
        "the last message, where it is the assistant's",
        yields_to_prompt=True,
    ),
    RecordFormat(
        "alpaca",
        frozenset({"instruction", "output"}),
        _read_alpaca,
        ("instruction", "input", "system", "history", "output"),
        "output",
        yields_to_prompt=True,
    ),
    RecordFormat(
        "hh-rlhf",
        frozenset({"chosen", "rejected"}),
        _read_pairs,
        ("chosen",),
        "the last message of chosen",
        yields_to_prompt=True,
    ),
)
FORMAT_BY_NAME = {each.name: each for each in FORMATS}
# whose answers are apart from the conversation, so that there are some whatever the first rows are
WITH_ANSWER_COLUMN = frozenset({"ultrafeedback", "helpsteer2", "pku-saferlhf", "alpaca"})
CONVERSATION_COLUMNS = frozenset({"conversations", "chosen"})
OTHER_COLUMNS = frozenset({"completions", "history", "better_response_id"})  # every other column holds text
