"""Answers that a row brings for its game: texts, with weights of the base policy where there are some."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import RowError
from pipeline.inputs.conversations import check_text
from pipeline.quoting import quote
from pipeline.records import Candidate

MOST = 1024  # candidates of a row


def read_candidates(value: Any, column: str | None) -> tuple[Candidate, ...]:
    """The candidates of a row: a list of texts, or of {text, weight}, also as JSON text.

    Raises:
        RowError: the value is something else, or there are fewer than two different answers.
    """
    if column is None:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(f"{column} must be a list of answers; got the text {quote(value)}") from None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError(f"{column} must be a list of answers; got {quote(value)}")
    found = [_read(each, column) for each in value]
    if len({each.text for each in found}) < 2 or len(found) > MOST:
        raise RowError(f"{column} must have from 2 to {MOST:,} different answers; got {len(found)}")
    total = sum(each.weight for each in found)
    if not 0 < total < math.inf:
        raise RowError(f"{column}: {'all weights are 0' if total == 0 else 'the weights have no finite sum'}")
    return tuple(found)


def _read(value: Any, column: str) -> Candidate:
    weight: Any = 1.0
    if isinstance(value, Mapping):
        if set(value) - {"text", "weight"} or "text" not in value:
            raise RowError(f"{column}: an answer is a text, or has text and weight; got {quote(dict(value))}")
        value, weight = value["text"], 1.0 if value.get("weight") is None else value["weight"]
    if not isinstance(value, str) or not value:
        raise RowError(f"{column}: an answer must be a text that is not empty; got {quote(value)}")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise RowError(f"{column}: a weight must be a number from 0; got {quote(weight)}")
    return Candidate(check_text(value, column), float(weight))
