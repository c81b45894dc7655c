"""The parameters in the bodies of batch requests are the row's own, or the plan names them as not obeyed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.decoding import NOWHERE, ask, config_of, decode
from support.storage import make_config, write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.errors import RowError
from pipeline.inputs.batch_bodies import NEUTRAL
from pipeline.inputs.notes import describe_input
from pipeline.inputs.source import open_input
from pipeline.records import Row
from pipeline.runtime.assembly import assemble
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


# every parameter of the chat completions API, and those that vLLM adds: a value that asks for something
PARAMETERS: dict[str, Any] = {
    "audio": {"voice": "alloy"}, "frequency_penalty": 0.5, "function_call": "none", "functions": [{"name": "f"}],
    "logit_bias": {"5": 1}, "logprobs": True, "max_completion_tokens": 5, "max_tokens": 5, "metadata": {"a": "b"},
    "modalities": ["text", "audio"], "model": "gpt-x", "n": 3, "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"}, "presence_penalty": 1, "prompt_cache_key": "k",
    "prompt_cache_retention": "24h", "reasoning_effort": "high", "response_format": {"type": "json_object"},
    "safety_identifier": "s", "seed": 4, "service_tier": "flex", "stop": ".", "stream": True,
    "stream_options": {"include_usage": True}, "temperature": 0.5, "tool_choice": "none",
    "tools": [{"type": "function", "function": {"name": "f"}}], "top_logprobs": 3, "top_p": 0.5, "user": "u",
    "verbosity": "low", "web_search_options": {}, "add_generation_prompt": False, "allowed_token_ids": [1],
    "bad_words": ["x"], "best_of": 2, "cache_salt": "x", "chat_template": "x", "chat_template_kwargs": {"a": 1},
    "continue_final_message": True, "documents": [{"text": "x"}], "echo": True, "guided_json": {"type": "object"},
    "ignore_eos": True, "include_stop_str_in_output": True, "length_penalty": 2, "min_p": 0.1, "min_tokens": 3,
    "priority": 1, "prompt_logprobs": 1, "repetition_penalty": 1.2, "skip_special_tokens": False,
    "stop_token_ids": [1], "structured_outputs": {"json": {}}, "top_k": 5, "truncate_prompt_tokens": 9,
    "use_beam_search": True, "vllm_xargs": {"a": 1}, "thinking": {"type": "enabled"}, "something_new": 1,
}  # fmt: skip
OBEYED = {
    "max_completion_tokens": "max_new_tokens", "max_tokens": "max_new_tokens", "seed": "seed", "stop": "stop",
    "tools": "tools", "functions": "tools", "chat_template_kwargs": "template_kwargs",
    "reasoning_effort": "wished_kwargs",
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_obeyed_or_named_in_the_plan(tmp_path: Path, name: str) -> None:
    value = PARAMETERS[name]
    row = requested(tmp_path, **{name: value})
    notes = "\n".join(notes_of(tmp_path, [{name: value}]))
    if name in OBEYED:
        assert getattr(row, OBEYED[name])
        assert f"{name} of 1 requests is not obeyed" not in notes
    else:
        assert row.not_obeyed == ((name, value),)
        assert f"requests: {name} of 1 requests is not obeyed" in notes


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_value_that_asks_for_nothing_is_not_named(tmp_path: Path, name: str) -> None:
    for value in NEUTRAL[name]:
        assert notes_of(tmp_path, [{name: value}]) == []
    assert "False" in notes_of(tmp_path, [{"n": False}])[0]  # 0 is not false


SAID = {"role": "user", "content": TEXT}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": TEXT}, (SAID,)),
        ({"input": [SAID]}, (SAID,)),
        ({"input": TEXT, "instructions": "be kind"}, ({"role": "system", "content": "be kind"}, SAID)),
        (
            {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": TEXT}]}]},
            (SAID,),
        ),
        (
            {
                "input": [
                    {"role": "developer", "content": "short"},
                    {"role": "user", "content": "what?"},
                    {"type": "reasoning", "summary": []},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x": 1}'},
                    {"type": "function_call", "call_id": "d", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "c", "output": "7"},
                    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "seven"}]},
                    SAID,
                ]
            },
            (
                {"role": "developer", "content": "short"},
                {"role": "user", "content": "what?"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                        {"id": "d", "type": "function", "function": {"name": "f", "arguments": {}}},
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": "7"},
                {"role": "assistant", "content": "seven"},
                SAID,
            ),
        ),
    ],
)
def test_requests_of_the_responses_api_are_read(tmp_path: Path, body: Any, messages: Any) -> None:
    body = {**body, "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": 5, "model": "gpt-x"}
    body["reasoning"] = {"effort": "low", "summary": "auto"}
    for url in ({"url": "/v1/responses"}, {}):
        path = write_jsonl(tmp_path / "x.jsonl", [{"custom_id": "a", **url, "body": body}])
        (row,) = open_input(InputConfig(path=str(path)))
        assert row.error is None
        assert (row.row_id, row.messages, row.max_new_tokens) == ("a", messages, 5)
        assert row.tools == ({"type": "function", "function": FUNCTION},)
        assert row.wished_kwargs == {"reasoning_effort": "low"}
        assert dict(row.not_obeyed) == {"model": "gpt-x", "reasoning": {"summary": "auto"}}


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (
            {"body": {"input": TEXT, "previous_response_id": "r"}},
            "body.previous_response_id refers to what the service",
        ),
        ({"body": {"conversation": "c", "input": TEXT}}, "body.conversation refers to what the service keeps"),
        ({"url": "/v1/responses", "body": {"prompt": {"id": "p"}}}, "body.prompt refers to what the service keeps"),
        ({"body": {"input": None}}, "body.input is null"),
        (
            {"body": {"input": [{"type": "item_reference"}]}},
            "body.input[0] is an item of type 'item_reference'; only",
        ),
        (
            {"body": {"input": TEXT, "tools": [{"type": "web_search"}]}},
            "body.tools[0] is a tool of type 'web_search'",
        ),
        (
            {"url": "/v1/embeddings", "body": {"input": TEXT}},
            "it is a request of '/v1/embeddings'; only requests of",
        ),
        (
            {"url": "/v1/completions", "body": {"prompt": TEXT}},
            "it is a request of '/v1/completions'; only requests of",
        ),
        ({"body": {"prompt": TEXT}}, "there is no body.messages; only requests of /v1/chat/completions"),
    ],
)
def test_other_requests_are_row_errors_that_name_them(tmp_path: Path, request_: Any, error: str) -> None:
    path = write_jsonl(
        tmp_path / "x.jsonl", [{"custom_id": "a", **request_}, {"custom_id": "b", "body": {"messages": [SAID]}}]
    )
    row, other = open_input(InputConfig(path=str(path)))
    assert row.row_id == "a"
    assert row.error is not None
    assert error in row.error
    assert other.error is None


KWARGS = {"enable_thinking": False, "documents": [{"text": "x"}]}


@pytest.mark.parametrize("value", [KWARGS, json.dumps(KWARGS), {**KWARGS, "absent": None}])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_have_their_own_values_for_chat_templates(tmp_path: Path, value: Any, suffix: str) -> None:
    for name, fields in (("chat_template_kwargs", {}), ("kw", {"chat_template_kwargs": "kw"})):
        path = tmp_path / f"x{suffix}"
        records = [{"prompt": TEXT, name: value}, {"prompt": TEXT, name: None}]
        if suffix == ".jsonl":
            write_jsonl(path, records)
        else:
            pq.write_table(pa.Table.from_pylist(records), path)
        row, other = open_input(InputConfig(path=str(path), **fields))
        assert (row.template_kwargs, other.template_kwargs) == (KWARGS, {})


@pytest.mark.parametrize(("value", "shown"), [("x", "'x'"), ([1], "[1]"), ("[1]", "[1]"), (7, "7")])
def test_values_for_chat_templates_of_another_shape_are_row_errors(tmp_path: Path, value: Any, shown: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": TEXT, "chat_template_kwargs": value}])
    (row,) = open_input(InputConfig(path=str(path)))
    assert row.error is not None
    assert row.error.endswith(f"chat_template_kwargs must be an object, or its JSON text; got {shown}")


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{{ mood }}{{ reasoning_effort }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_row_s_values_take_the_place_of_the_base_s_and_not_of_a_principal_s(tiny: Any) -> None:
    base = {"model": str(tiny()), "chat_template": TEMPLATE, "chat_template_kwargs": {"mood": "calm"}}
    principals = {
        "kind": {"kind": "prompted", "principle": "be kind"},
        "own": {"kind": "prompted", "principle": "be odd", "chat_template_kwargs": {"mood": "wild"}},
    }
    prompter = assemble(config_of(base, principals), NOWHERE).prompter

    def endings(**fields: Any) -> dict[str, str]:
        row = ask("a", TEXT, **fields)
        prompts = prompter.encode(row.messages, {}, (), prompter.kwargs_of(row))
        texts = {role: "".join(map(prompter.token_text, ids)) for role, ids in prompts.items()}
        return {role: text.split("<|end|>")[-1].split("<")[0] for role, text in texts.items()}

    assert (endings()["base"], endings()["kind"], endings()["own"]) == ("calm", "calm", "wild")
    changed = endings(template_kwargs={"mood": "glad"})
    assert (changed["base"], changed["kind"], changed["own"]) == ("glad", "glad", "wild")
    assert endings(wished_kwargs={"reasoning_effort": "high"})["base"] == "calmhigh"
    with pytest.raises(
        RowError, match=r"chat_template_kwargs\.tone has no effect: the chat template does not use it"
    ):
        endings(template_kwargs={"tone": "x"})
    with pytest.raises(RowError, match=r"chat_template_kwargs\.messages is set by the run itself"):
        endings(template_kwargs={"messages": []})


def test_a_wish_that_no_template_reads_changes_nothing(tiny: Any) -> None:
    config = config_of(tiny(), decoding={"max_new_tokens": 4})
    plain = decode(config, [ask("a", TEXT)])["a"]
    assert decode(config, [ask("a", TEXT, wished_kwargs={"reasoning_effort": "high"})])["a"] == plain


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
