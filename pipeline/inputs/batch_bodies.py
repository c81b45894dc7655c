"""The parameters in the body of an OpenAI batch request: which are the row's own, and which are not obeyed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RowError
from pipeline.quoting import quote

LENGTH_KEYS = ("max_completion_tokens", "max_tokens")  # the first that is given counts, as at OpenAI
OBEYED_KEYS = (*LENGTH_KEYS, "seed", "stop")
READ_KEYS = ("messages", "tools")  # they are no parameters
SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class RequestParameters:
    """What one request asks for.

    Args:
        max_new_tokens: the answer's limit.
        seed: of the draws.
        stop: strings that end the answer.
        not_obeyed: every other parameter that is not null, by its name.
    """

    max_new_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    not_obeyed: tuple[tuple[str, Any], ...] = ()


def read_parameters(body: Mapping[str, Any]) -> RequestParameters:
    """Read a request's parameters; null is as if left out.

    Raises:
        RowError: one that is obeyed has a value that it cannot have.
    """
    given = {key: value for key, value in body.items() if value is not None}
    lengths = [_whole(given[key], key, at_least=1, below=SEED_LIMIT) for key in LENGTH_KEYS if key in given]
    return RequestParameters(
        max_new_tokens=lengths[0] if lengths else None,
        seed=_whole(given["seed"], "seed", at_least=0, below=SEED_LIMIT) if "seed" in given else None,
        stop=_stop(given["stop"]) if "stop" in given else None,
        not_obeyed=tuple((key, given[key]) for key in given if key not in (*OBEYED_KEYS, *READ_KEYS)),
    )


def _whole(value: Any, key: str, *, at_least: int, below: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < below:
        raise RowError(f"body.{key} must be a whole number from {at_least}; got {quote(value)}")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RowError(f"body.stop must be a text or a list of texts that are not empty; got {quote(value)}")
    return tuple(texts)
