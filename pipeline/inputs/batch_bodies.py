"""The parameters in the body of an OpenAI batch request: which are the row's own, and which are not obeyed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import RowError
from pipeline.quoting import quote

LENGTH_KEYS = ("max_completion_tokens", "max_tokens")  # the first that is given counts, as at OpenAI
TEMPLATE_KWARGS = "chat_template_kwargs"  # vLLM's
WISHED_KEYS = ("reasoning_effort",)  # that chat templates may read
OBEYED_KEYS = (*LENGTH_KEYS, "seed", "stop", TEMPLATE_KWARGS, *WISHED_KEYS)
READ_KEYS = ("messages", "tools", "functions")  # they are no parameters
# values that ask for nothing beyond what is done anyway; what a service does with a request is not about its answer
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "background": (False,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("auto",),
    "ignore_eos": (False,),
    "include": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (True, False),
    "stream": (False,),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto",),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "use_beam_search": (False,),
}
SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class RequestParameters:
    """What one request asks for.

    Args:
        max_new_tokens: the answer's limit.
        seed: of the draws.
        stop: strings that end the answer.
        template_kwargs: what chat templates read besides the messages.
        wished_kwargs: likewise, where a template reads them.
        not_obeyed: every other parameter that is not null, by its name.
    """

    max_new_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    not_obeyed: tuple[tuple[str, Any], ...] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    wished_kwargs: Mapping[str, Any] = field(default_factory=dict)


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
        not_obeyed=tuple((key, given[key]) for key in given if _is_without_effect(key, given[key])),
        template_kwargs=read_template_kwargs(given.get(TEMPLATE_KWARGS), f"body.{TEMPLATE_KWARGS}"),
        wished_kwargs={key: given[key] for key in WISHED_KEYS if key in given},
    )


def read_template_kwargs(value: Any, where: str) -> dict[str, Any]:
    """What chat templates read besides the messages: an object, also as JSON text or an Arrow map.

    Nulls are left out: a column of structs fills what a row does not have with them.

    Raises:
        RowError: it is none, or holds what JSON cannot.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{where} must be an object, or its JSON text; got {quote(value)}") from None
    if value is None or value == "":
        return {}
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        value = dict(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RowError(f"{where} must be an object, or its JSON text; got {quote(value)}")
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, TypeError, RecursionError):
        raise RowError(f"{where} holds a value that JSON cannot hold, or a lone surrogate") from None
    return {key: each for key, each in value.items() if each is not None}


def _is_without_effect(key: str, value: Any) -> bool:
    if key in OBEYED_KEYS or key in READ_KEYS:
        return False
    neutral = NEUTRAL.get(key, ())
    return not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _whole(value: Any, key: str, *, at_least: int, below: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < below:
        raise RowError(f"body.{key} must be a whole number from {at_least}; got {quote(value)}")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RowError(f"body.stop must be a text or a list of texts that are not empty; got {quote(value)}")
    return tuple(texts)
