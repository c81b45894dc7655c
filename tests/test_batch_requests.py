"""The parameters in the bodies of batch requests are the row's own, or the plan names them as not obeyed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.decoding import ask, config_of, decode
from support.storage import make_config, write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.inputs.notes import describe_input
from pipeline.inputs.source import open_input
from pipeline.records import Row
from pipeline.storage.plan import open_planned_input

TEXT = "tell me a story about the sea"


def write_requests(path: Path, bodies: list[dict[str, Any]]) -> Path:
    messages = [{"role": "user", "content": TEXT}]
    return write_jsonl(
        path, [{"custom_id": str(at), "body": {"messages": messages, **body}} for at, body in enumerate(bodies)]
    )


def requested(folder: Path, **body: Any) -> Row:
    (row,) = open_input(InputConfig(path=str(write_requests(folder / "x.jsonl", [body]))))
    return row


def notes_of(folder: Path, bodies: list[dict[str, Any]], **sections: Any) -> list[str]:
    config = make_config(write_requests(folder / "x.jsonl", bodies), **sections)
    return list(describe_input(open_planned_input(config), config))


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"max_tokens": 5}, "max_new_tokens", 5),
        ({"max_completion_tokens": 7}, "max_new_tokens", 7),
        ({"max_completion_tokens": 7, "max_tokens": 5}, "max_new_tokens", 7),
        ({"max_tokens": None}, "max_new_tokens", None),
        ({"seed": 3}, "seed", 3),
        ({"stop": "."}, "stop", (".",)),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop": None}, "stop", None),
        ({"temperature": 0.5, "user": None, "n": 2}, "not_obeyed", (("temperature", 0.5), ("n", 2))),
    ],
)
def test_a_body_is_read_as_the_row_s_own_parameters(tmp_path: Path, body: Any, field: str, value: Any) -> None:
    assert getattr(requested(tmp_path, **body), field) == value


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"max_tokens": 0}, "body.max_tokens must be a whole number from 1; got 0"),
        ({"max_tokens": "5"}, "body.max_tokens must be a whole number from 1; got '5'"),
        ({"max_completion_tokens": True}, "body.max_completion_tokens must be a whole number from 1; got True"),
        ({"seed": -1}, "body.seed must be a whole number from 0; got -1"),
        ({"stop": [""]}, "body.stop must be a text or a list of texts that are not empty; got ['']"),
        ({"stop": 5}, "body.stop must be a text or a list of texts that are not empty; got 5"),
    ],
)
def test_a_parameter_that_cannot_be_obeyed_is_the_row_s_error(tmp_path: Path, body: Any, error: str) -> None:
    assert requested(tmp_path, **body).error == f"line 1 of x.jsonl: {error}"


def test_what_is_not_obeyed_is_named_with_its_values(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {"max_tokens": 5, "temperature": 0.7, "model": "gpt-x"},
        {"max_tokens": 999, "temperature": 1.0, "n": 3, "top_p": 1},
        {"temperature": 0.2, "logit_bias": {"5": 1}},
    ]
    assert notes_of(tmp_path, bodies) == [
        "requests: the length limits, seeds and stop strings of 2 requests are obeyed row by row",
        "requests: the length limits of 1 requests are above decoding.max_new_tokens, so their answers end at 256 "
        "tokens",
        "requests: temperature of 2 requests is not obeyed (0.7, 0.2): decoding.temperature is 1 for every row",
        "requests: model of 1 requests is not obeyed ('gpt-x')",
        "requests: n of 1 requests is not obeyed (3): decoding.n is 1 for every row",
        "requests: logit_bias of 1 requests is not obeyed ({'5': 1})",
    ]
    assert notes_of(tmp_path, [{}, {"temperature": None}]) == []


def test_rows_that_only_the_base_answers_are_said(tmp_path: Path) -> None:
    zero = {"brief": 0, "kind-1": 0}
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "w": w} for w in (zero, {"brief": 0}, None)])
    config = make_config(path, input={"weights": "w"})
    assert describe_input(open_planned_input(config), config) == (
        "weights: every principal has weight 0 in 1 of the 3 rows: the base answers as it does alone",
    )


def test_rows_have_their_own_length_seed_and_stop_strings(tiny: Any) -> None:
    config = config_of(tiny(), decoding={"max_new_tokens": 12, "seed": 3, "stop": ["zzz"]})
    plain = decode(config, [ask("a", TEXT)])["a"]
    assert decode(config, [ask("a", TEXT, max_new_tokens=5)])["a"].num_tokens == 5
    other = decode(config_of(tiny(), decoding={"max_new_tokens": 12, "seed": 9}), [ask("a", TEXT)])["a"]
    assert decode(config, [ask("a", TEXT, seed=9)])["a"].response == other.response != plain.response
    assert plain.response is not None
    cut = plain.response[3:5]
    stopped = decode(config, [ask("a", TEXT, stop=(cut,))])["a"]
    assert stopped.response == plain.response[: plain.response.index(cut)]
    assert stopped.finish_reason == "stop"
