"""Bad input: a fault of a row stays in the row, a fault of the input is one line, nothing is a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.storage import write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.errors import ConfigurationError, StorageError
from pipeline.inputs import jsonl
from pipeline.inputs.files import as_input_error
from pipeline.inputs.record_formats import FORMATS
from pipeline.inputs.source import open_input
from pipeline.records import FinishReason, Record, Row
from pipeline.storage.tables import output_schema, to_table

SCHEMA = output_schema([], has_tools=True)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(path: Path, principals: tuple[str, ...] = ("a", "b"), **fields: Any) -> list[Row]:
    return list(open_input(InputConfig(path=str(path), **fields), principals))


def error_of(folder: Path, record: Any, **fields: Any) -> str:
    """The error of a record between two good ones, which must not be touched by it."""
    good = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "w": {"a": 1.0}, "old": "y"}
    first, bad, last = rows_of(write_jsonl(folder / "x.jsonl", [good, record, good]), **fields)
    assert first.error is None
    assert last.error is None
    assert bad.error is not None
    assert bad.given is not None
    assert bad.row_id == "x.jsonl:2"
    return bad.error


def refusal_of(path: Path | str, **fields: Any) -> str:
    with pytest.raises(ConfigurationError) as refused:
        open_input(InputConfig(path=str(path), **fields), ("a", "b"))
    message = str(refused.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"prompt": null}', "line 2 of x.jsonl: prompt is null"),
        (b'{"prompt": ""}', "line 2 of x.jsonl: prompt is empty"),
        (b'{"prompt": " \\t\\n\\u00a0"}', "line 2 of x.jsonl: prompt is empty"),
        (b'{"prompt": 3}', "line 2 of x.jsonl: prompt must be text or a list of messages; got 3"),
        (b'{"prompt": ["x"]}', "line 2 of x.jsonl: prompt[0] must be an object with role and content; got 'x'"),
        (b'{"other": 3}', "line 2 of x.jsonl: there is no prompt"),
        (b'{"prompt": "a\xff"}', "line 2 of x.jsonl is not valid UTF-8"),
        (b'{"prompt": "a\\ud800"}', "line 2 of x.jsonl: prompt has a lone surrogate at character 1"),
        (b'{"prompt": "a"', "line 2 of x.jsonl is not valid JSON: Expecting ',' delimiter at character 15"),
        (b'["prompt"]', "line 2 of x.jsonl is not a JSON object"),
        (b"null", "line 2 of x.jsonl is not a JSON object"),
        (
            b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
            "line 2 of x.jsonl is not usable: it holds a number with too many",
        ),
        (
            b'{"prompt": "a", "n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
            "line 2 of x.jsonl is not usable: it is nested too",
        ),
        (b"\x1f\x8b\x08 compressed", "line 2 of x.jsonl is not valid UTF-8"),
    ],
)
def test_a_bad_line_is_a_row_error_that_names_it(tmp_path: Path, line: bytes, error: str) -> None:
    assert error_of(tmp_path, line, prompt="prompt").startswith(error)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (None, "messages is null"),
        ([], "messages is empty"),
        (
            "Hi",
            "messages must be a list of messages, that list as JSON text, or a transcript of Human: and Assistant:; "
            "got 'Hi'",
        ),
        ('{"role": "user"}', "messages must be a list of messages, that list as JSON text, or a transcript"),
        ("[]", "messages is empty"),
        ({"role": "user"}, "messages must be a list of messages; got {'role': 'user'}"),
        (["Hi"], "messages[0] must be an object with role and content; got 'Hi'"),
        ([{"role": "user"}], "messages[0].content must be text; got None"),
        ([{"content": "x"}], "messages[0].role must be one of system, developer, user, assistant, tool; got None"),
        (
            [{"role": "bot", "content": "x"}],
            "messages[0].role must be one of system, developer, user, assistant, tool; got 'bot'",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}],
            "messages[0].content[1] is a part of type 'image_url'; only parts of text are read",
        ),
        ([{"role": "user", "content": [7]}], "messages[0].content[0] must be a part with type and text; got 7"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text must be text; got None"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content must be text; got {'text': 'x'}"),
        (
            [{"from": "narrator", "value": "x"}],
            "messages[0].from must be one of system, human, user, prompter, gpt, assistant, chatgpt, bard, bing, "
            "model, ai, bot, chatbot, claude, instruction, function_call, function-call, tool_call, tool, "
            "observation, function, function_response, function-response, tool_response; got 'narrator'",
        ),
        ([{"from": "human", "value": None}], "messages[0].value must be text; got None"),
        (
            [{"role": "assistant", "content": "y"}],
            "before the assistant's last of messages there is no message to answer",
        ),
        (
            [{"role": role, "content": role} for role in ("user", "assistant", "assistant")],
            "before the assistant's last of messages there is no message to answer",
        ),
        ([{"role": "user", "content": " "}], "the last of messages is empty"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{}]}, {"role": "tool", "content": "x"}],
            "messages[0].tool_calls[0] must be the call of a function with a name; got {}",
        ),
        ([{"role": "user", "content": "x", "audio": {"id": "a"}}], "messages[0] has audio, which is not supported"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content has a lone surrogate at character 0"),
    ],
)
def test_messages_of_the_wrong_shape_are_row_errors(tmp_path: Path, messages: Any, error: str) -> None:
    message = error_of(tmp_path, {"messages": messages}, last_assistant="response")
    assert message.startswith(f"line 2 of x.jsonl: {error}")


def test_notes_in_messages_are_dropped(tmp_path: Path) -> None:
    message = {"role": "user", "content": "x", "name": None, "tool_calls": [], "id": 7, "likes": {"a": 1}}
    (row,) = rows_of(write_jsonl(tmp_path / "x.jsonl", [{"messages": [message]}]))
    assert row.messages == ({"role": "user", "content": "x"},)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"c": 1}, "weights name the unknown principal 'c'; principals: a, b"),
        ({"a": -0.1}, "the weight of a must be finite and not negative; got -0.1"),
        ({"a": None}, "the weight of a is null; give a number, or leave it out to keep the configured one"),
        ({"b": 1, "a": None}, "the weight of a is null; give a number, or leave it out"),
        ({"a": "1"}, "the weight of a must be a number; got '1'"),
        ({"a": True}, "the weight of a must be a number; got True"),
        ({"a": float("nan")}, "the weight of a must be finite and not negative; got nan"),
        ({"b": float("inf")}, "the weight of b must be finite and not negative; got inf"),
        ({"b": 10**400}, "the weight of b must be finite and not negative; got 1000"),
        ([1.0, 2.0], "weights must be an object {principal: number}; got [1.0, 2.0]"),
        (0.5, "weights must be an object {principal: number}; got 0.5"),
    ],
)
def test_bad_weights_are_row_errors(tmp_path: Path, weights: Any, error: str) -> None:
    record = {"prompt": "x", "w": weights}
    message = error_of(tmp_path, record, prompt="prompt", weights="w")
    assert message.startswith(f"line 2 of x.jsonl: {error}")


def test_weights_left_out_keep_the_configured_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "w": w} for w in ({"a": 1}, {}, None)])
    assert [row.weights for row in rows_of(path, weights="w")] == [{"a": 1.0}, None, None]


def test_a_response_that_is_not_text_is_a_row_error(tmp_path: Path) -> None:
    message = error_of(tmp_path, {"prompt": "x", "old": 5}, prompt="prompt", response="old")
    assert message == "line 2 of x.jsonl: response must be text or a list of messages; got 5"
    assert (
        rows_of(write_jsonl(tmp_path / "y.jsonl", [{"prompt": "x", "old": None}]), response="old")[0].response is None
    )


def test_control_characters_of_the_input_are_not_echoed(tmp_path: Path) -> None:
    message = error_of(tmp_path, {"prompt": ["\x1b[2J\x07"]}, prompt="prompt")
    assert message.isprintable()
    assert "\\x1b[2J" in message
    assert "\x1b" not in refusal_of(write_jsonl(tmp_path / "y.jsonl", [{"a\x1b[2J": 1, "b\ud800": 2}]))


def test_a_line_without_end_is_a_row_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "LINE_LIMIT_BYTES", 2**20)
    message = error_of(tmp_path, b'{"prompt": "' + b"x" * 3 * 2**20 + b'"}', prompt="prompt")
    assert message == "line 2 of x.jsonl is longer than 1 MiB"


def test_null_and_broken_text_in_parquet_are_row_errors(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe", None, b" "], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "x.parquet")
    good, not_utf8, null, blank = rows_of(tmp_path / "x.parquet")
    assert good.error is None
    assert not_utf8.error == "row 1 of x.parquet: prompt is not valid UTF-8"
    assert null.error == "row 2 of x.parquet: prompt is null"
    assert blank.error == "row 3 of x.parquet: prompt is empty"


ADVICE = "without input.id rows are named by file and position"


def write_either(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        return write_jsonl(path, records)
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_with_a_repeated_or_null_id_fail_alone(tmp_path: Path, suffix: str) -> None:
    path = write_either(tmp_path / f"x{suffix}", [{"prompt": "x", "key": key} for key in ("a", "b", "a", None, "c")])
    rows = rows_of(path, id="key")
    first = 1 if suffix == ".jsonl" else 0
    assert [row.row_id for row in rows] == [f"x{suffix}:{first}", "b", f"x{suffix}:{first + 2}", rows[3].row_id, "c"]
    assert rows[3].row_id == f"x{suffix}:{first + 3}"
    place = "line 3 of x.jsonl" if first else "row 2 of x.parquet"
    assert rows[2].error == f"{place}: key 'a' is the id of several rows; {ADVICE}"
    assert rows[3].error is not None
    assert rows[3].error.endswith(f": key must be an id, text or a whole number; got None; {ADVICE}")
    assert [row.error for row in rows if row.row_id in "bc"] == [None, None]


def test_ids_that_repeat_in_another_file_fail(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "key": 1}, {"prompt": "x", "key": 2}])
    pq.write_table(pa.table({"prompt": ["x"], "key": ["1"]}), tmp_path / "b.parquet")
    assert [row.row_id for row in rows_of(tmp_path, id="key")] == ["a.jsonl:1", "2", "b.parquet:0"]


def test_an_id_that_looks_like_a_position_does_not_hide_another_row(tmp_path: Path) -> None:
    keys = ["x.jsonl:3", "x.jsonl:1", None, "good", "x.jsonl:9"]
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "key": key} for key in keys] + [b"broken"])
    rows = rows_of(path, id="key")
    # the row without an id takes the name x.jsonl:3; so the first row must be named by position, then the second
    assert [row.row_id for row in rows] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3", "good", "x.jsonl:9", "x.jsonl:6"]
    assert [row.error is None for row in rows] == [False, False, False, True, True, False]


def test_a_column_that_is_none_of_ids_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "key": index // 2} for index in range(2002)])
    assert refusal_of(path, id="key") == (
        "row ids must be unique; 1001 repeat in the column 'key': '0' (2 times), '1' (2 times), '2' (2 times), "
        f"'3' (2 times), '4' (2 times), ...; {ADVICE}"
    )


@pytest.mark.parametrize("bad", [None, "", "  ", 1.5, True, ["a"], {}, "\ud800"])
def test_an_id_column_without_ids_is_refused_with_places(tmp_path: Path, bad: Any) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "key": "a"}] + [{"prompt": "x", "key": bad}] * 6)
    places = ", ".join(f"line {number} of x.jsonl" for number in range(2, 7))
    assert refusal_of(path, id="key") == (
        f"6 of 7 rows have no usable id (text or a whole number) in the column 'key': {places}, ...; {ADVICE}"
    )


def test_batch_requests_with_a_repeated_or_no_custom_id_are_row_errors(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    request = {"custom_id": "r", "body": body}
    rows = rows_of(write_jsonl(tmp_path / "x.jsonl", [request, request, {**request, "custom_id": "s"}]))
    assert [row.row_id for row in rows] == ["x.jsonl:1", "x.jsonl:2", "s"]
    assert rows[0].error == f"line 1 of x.jsonl: custom_id 'r' is the id of several rows; {ADVICE}"
    row = rows_of(write_jsonl(tmp_path / "y.jsonl", [request, {"body": body}]))[1]
    assert row.error == "line 2 of y.jsonl is not a batch request with custom_id and body.messages"


@pytest.mark.parametrize("field", ["prompt", "messages", "id", "weights", "response"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, field: str, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [{"text": "x", "prompt": "y"}])
    else:
        pq.write_table(pa.table({"text": ["x"], "prompt": ["y"]}), path)
    message = refusal_of(path, **{field: "nope"})
    assert message == f"input.{field}: there is no column 'nope'; columns of x{suffix}: 'text', 'prompt'"


def test_no_prompt_column_at_all_says_what_there_is(tmp_path: Path) -> None:
    message = refusal_of(write_jsonl(tmp_path / "x.jsonl", [{"text": "x", "id": 1}]))
    assert message.startswith("there is no column messages and no column prompt; name one with input.prompt or")
    assert message.endswith("columns of x.jsonl: 'text', 'id'")


@pytest.mark.parametrize(
    ("column", "values", "fields", "message"),
    [
        ("prompt", pa.array([1]), {}, "the column prompt of x.parquet has type int64; it must hold text"),
        (
            "prompt",
            pa.array([[{"role": "user", "text": "x"}]]),
            {},
            "it must hold text, or a list of {role, content}",
        ),
        ("prompt", pa.array([b"x"]), {}, "the column prompt of x.parquet has type binary; it must hold text"),
        (
            "messages",
            pa.array([1]),
            {},
            "has type int64; it must hold a list of {role, content} with text in both, or that list as JSON text",
        ),
        ("messages", pa.array([[{"from": "x"}]]), {}, "it must hold a list of {role, content} with text in both"),
        (
            "prompt",
            pa.array(["x"]),
            {"id": "f"},
            "the column f of x.parquet has type double; it must hold text or whole",
        ),
        ("prompt", pa.array(["x"]), {"weights": "f"}, "it must hold a struct or map of principal to number"),
        (
            "prompt",
            pa.array(["x"]),
            {"response": "f"},
            "the column f of x.parquet has type double; it must hold text",
        ),
    ],
)
def test_a_column_of_the_wrong_type_is_refused(
    tmp_path: Path, column: str, values: pa.Array, fields: dict[str, str], message: str
) -> None:
    pq.write_table(pa.table({column: values, "f": pa.array([1.5])}), tmp_path / "x.parquet")
    assert message in refusal_of(tmp_path / "x.parquet", **fields)


def test_a_column_that_is_there_twice_is_refused_if_it_is_needed(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"]), pa.array(["z"])], ["prompt", "prompt", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert refusal_of(tmp_path / "x.parquet") == "x.parquet has more than one column 'prompt'"
    assert rows_of(tmp_path / "x.parquet", prompt="text")[0].messages[0]["content"] == "z"


def test_weights_without_principals_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x", "w": {"a": 1}}])
    with pytest.raises(ConfigurationError, match="there are no principals"):
        open_input(InputConfig(path=str(path), weights="w"))


def test_what_is_no_input_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("a,b")
    (tmp_path / "none.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n\n  \n")
    (tmp_path / "zero.parquet").write_bytes(b"")
    (tmp_path / "text.parquet").write_bytes(b"not a table")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    assert refusal_of(tmp_path / "empty").startswith("input.path: no input file in the folder ")
    assert "x.txt must end in one of .parquet, .pq, .jsonl, .ndjson, .json, .csv" in refusal_of(tmp_path / "x.txt")
    assert refusal_of(tmp_path / "none.jsonl").endswith("none.jsonl holds no rows")
    assert refusal_of(tmp_path / "blank.jsonl").endswith("blank.jsonl holds no rows")
    assert refusal_of(tmp_path / "rows.parquet").endswith("rows.parquet holds no rows")
    assert refusal_of(tmp_path / "zero.parquet").startswith("zero.parquet cannot be read: ")
    assert refusal_of(tmp_path / "text.parquet").startswith("text.parquet cannot be read: ")
    assert "there is no file or folder" in refusal_of(tmp_path / "gone.jsonl")
    assert "ftp:// is not supported" in refusal_of("ftp://x/y.jsonl")


@pytest.mark.parametrize("name", [b"a\x1b[2J.jsonl", b"a\xff.jsonl", b"a\nb.jsonl"])
def test_a_file_name_that_cannot_be_shown_is_refused(tmp_path: Path, name: bytes) -> None:
    write_jsonl(tmp_path / os.fsdecode(name), [{"prompt": "x"}])
    assert refusal_of(tmp_path).startswith("the file name 'a\\")


def test_neither_a_path_nor_a_data_set_says_so() -> None:
    message = refusal_of("nobody-of-this-name/no-such-data-set")
    assert message.startswith(
        "input.path: there is no file or folder 'nobody-of-this-name/no-such-data-set', and no data set"
    )


def test_lines_that_are_all_broken_are_all_row_errors(tmp_path: Path) -> None:
    rows = rows_of(write_jsonl(tmp_path / "x.jsonl", [b"{", b"\xff", b"[]"]))
    assert [row.row_id for row in rows] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"]
    assert all(row.error for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_input_that_got_shorter_is_refused_when_it_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"

    def write(num_rows: int) -> None:
        records = [{"prompt": f"q{index}"} for index in range(num_rows)]
        if suffix == ".jsonl":
            write_jsonl(path, records)
        else:
            pq.write_table(pa.Table.from_pylist(records), path)

    write(9)
    source = open_input(InputConfig(path=str(path)))
    write(5)
    with pytest.raises(ConfigurationError, match="is shorter than when the run was planned"):
        list(source)
    path.unlink()
    with pytest.raises(ConfigurationError, match="does not exist any more"):
        list(source)


def check_fuzzed(path: Path, **fields: Any) -> list[Row]:
    """Either one printable line, or rows that each have messages or an error, with unique ids."""
    rows, message = [], ""
    try:
        rows = rows_of(path, **fields)
    except ConfigurationError as refused:
        message = str(refused)
    assert bool(rows) != bool(message)
    assert message.isprintable()
    assert len({row.row_id for row in rows}) == len(rows)
    for row in rows:
        assert row.messages if row.error is None else row.given is not None
        assert row.error is None or row.error.isprintable()
        read = [row.row_id, row.messages, row.weights, row.response, row.tools, row.template_kwargs]
        json.dumps(read, ensure_ascii=False, allow_nan=False).encode("utf-8")
        to_table(
            [Record(row.row_id, 0, row.messages, None, FinishReason.ERROR, 0, {}, {}, {}, tools=row.tools)], SCHEMA
        )
    return rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
PART = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image_url"]) | JSON, "text": JSON})
FUNCTION = st.fixed_dictionaries({}, optional={"name": st.sampled_from(["f", ""]) | JSON, "arguments": JSON})
CALL = st.fixed_dictionaries({}, optional={"id": JSON, "function": FUNCTION | JSON})
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "function", "x"]) | JSON,
        "content": st.lists(PART | JSON, max_size=2) | JSON,
        "from": st.sampled_from(["human", "gpt", "function_call", "observation", "x"]) | JSON,
        "value": JSON | JSON.map(json.dumps),
        "function_call": FUNCTION | JSON,
        "tool_calls": st.lists(CALL | JSON, max_size=2) | JSON,
        "tool_call_id": JSON,
        "name": JSON,
    },
)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning", "x"]) | JSON,
        "role": st.sampled_from(["user", "assistant", "developer"]) | JSON,
        "content": st.lists(PART | JSON, max_size=2) | JSON,
        **dict.fromkeys(("call_id", "name", "arguments", "output"), JSON),
    },
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(MESSAGE, max_size=2),
        "input": st.lists(ITEM | JSON, max_size=3) | JSON,
        "chat_template_kwargs": JSON,
        "reasoning": st.fixed_dictionaries({"effort": JSON}) | JSON,
        **dict.fromkeys(("instructions", "tools", "functions", "temperature", "max_output_tokens", "prompt"), JSON),
    },
)
CONVERSATION = st.lists(MESSAGE, max_size=3) | st.text().map("\n\nHuman: {}\n\nAssistant: ".format)
# the columns of every format that is recognised, with any values
OF_FORMATS = st.sampled_from(FORMATS).flatmap(
    lambda each: st.fixed_dictionaries(
        {
            name: st.sampled_from([0, 1]) | CONVERSATION | JSON
            for name in sorted({*each.columns, *each.uses, "tools"} - {"messages"})
        }
    )
)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text() | JSON | st.lists(MESSAGE, max_size=2).map(json.dumps),
        "chat_template_kwargs": JSON | JSON.map(json.dumps),
        "url": st.sampled_from(["/v1/responses", "/v1/chat/completions", "/v1/embeddings"]) | JSON,
        "messages": CONVERSATION | JSON,
        "tools": st.lists(st.fixed_dictionaries({"function": FUNCTION}), max_size=2) | JSON,
        "w": st.dictionaries(st.sampled_from(["a", "b", "c"]), JSON, max_size=3) | JSON,
        "old": JSON,
        "key": st.integers(0, 50) | JSON,
        "custom_id": JSON,
        "body": BODY | JSON,
    },
)
COLUMNS = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.just("messages"),
        "weights": st.just("w"),
        "response": st.just("old"),
        "id": st.just("key"),
        "tools": st.just("tools"),
        "chat_template_kwargs": st.sampled_from(["chat_template_kwargs", "w"]),
        "limit": st.integers(1, 5),
        "last_assistant": st.sampled_from(["response", "prefill", "error"]),
    },
)


@given(data=st.binary(max_size=300), columns=COLUMNS)
@FUZZ
def test_any_bytes_are_rows_or_one_line(tmp_path: Path, data: bytes, columns: dict[str, Any]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    check_fuzzed(path, **columns)


@given(records=st.lists(RECORD | JSON, max_size=6), columns=COLUMNS, garbage=st.binary(max_size=20))
@FUZZ
def test_any_json_is_rows_or_one_line(
    tmp_path: Path, records: list[Any], columns: dict[str, Any], garbage: bytes
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(json.dumps(record).encode() for record in records) + b"\n" + garbage)
    check_fuzzed(path, **columns)


@given(records=st.lists(OF_FORMATS, min_size=1, max_size=4))
@FUZZ
def test_any_records_of_known_formats_are_rows_or_one_line(tmp_path: Path, records: list[Any]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(json.dumps(record).encode() for record in records))
    check_fuzzed(path)


@given(
    position=st.floats(0, 1),
    replacement=st.binary(min_size=1, max_size=8),
    cut=st.booleans(),
    columns=st.fixed_dictionaries({}, optional={"id": st.just("key"), "limit": st.integers(1, 30)}),
)
@FUZZ
def test_a_damaged_parquet_file_is_rows_or_one_line(
    tmp_path: Path, position: float, replacement: bytes, cut: bool, columns: dict[str, Any]
) -> None:
    path = tmp_path / "x.parquet"
    records = [{"prompt": f"question {index}", "key": index, "n": [{"a": index}]} for index in range(20)]
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=7, compression="none")
    data = path.read_bytes()
    at = int(position * (len(data) - 1))
    path.write_bytes(data[:at] if cut else data[:at] + replacement + data[at + len(replacement) :])
    check_fuzzed(path, **columns)


ARROW = [
    pa.string(),
    pa.int64(),
    pa.float64(),
    pa.bool_(),
    pa.binary(),
    pa.null(),
    pa.list_(pa.string()),
    pa.date32(),
]


@given(
    types=st.lists(st.sampled_from([*ARROW, pa.struct([("a", pa.float32())])]), min_size=1, max_size=4),
    names=st.lists(st.sampled_from(["prompt", "messages", "key", "w", "old", "a.b", ""]), min_size=4, max_size=4),
    num_rows=st.integers(0, 3),
    columns=COLUMNS,
)
@FUZZ
def test_any_table_is_rows_or_one_line(
    tmp_path: Path, types: list[pa.DataType], names: list[str], num_rows: int, columns: dict[str, Any]
) -> None:
    arrays = [pa.nulls(num_rows, type_) for type_ in types]
    pq.write_table(pa.Table.from_arrays(arrays, names[: len(types)]), tmp_path / "x.parquet")
    check_fuzzed(tmp_path / "x.parquet", **columns)


@pytest.mark.parametrize(
    ("fault", "kind"), [(TimeoutError("read timed out"), StorageError), (OSError("gone"), ConfigurationError)]
)
def test_a_fault_that_may_pass_is_the_storages_and_not_the_inputs(fault, kind):
    with pytest.raises(kind, match=r"x\.jsonl cannot be read: "), as_input_error("x.jsonl"):
        raise fault
