"""Tools in conversations: read, written by templates that know them, refused by others, and kept in the output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.decoding import config_of, decode, engine_of
from support.storage import answer, make_config, write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.errors import RowError
from pipeline.inputs.notes import describe_input
from pipeline.inputs.source import InputSource, open_input
from pipeline.records import Row
from pipeline.storage.pairs import pairs_bytes
from pipeline.storage.plan import Plan, make_plan, open_planned_input
from pipeline.storage.tables import output_schema, to_table

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
AS_TEXT = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
USER = {"role": "user", "content": "Is it warm?"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "21 degrees", "tool_call_id": "c1", "name": "weather"}
CONVERSATION = [USER, CALLS, RESULT]
RECORD = {
    "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [AS_TEXT]}, RESULT],
    "tools": [WEATHER],
}

TOOLS = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
TURN = "[{{ m.role }}]{{ m.content }}"
WRITTEN_CALLS = "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.city }}){% endfor %}"
TEMPLATE = TOOLS + "{% for m in messages %}" + TURN + WRITTEN_CALLS + "{% endfor %}"


def opened(folder: Path, records: list[Any], **fields: Any) -> InputSource:
    return open_input(InputConfig(path=str(write_jsonl(folder / "x.jsonl", records)), **fields))


def error_of(folder: Path, record: Any) -> str:
    good, bad = opened(folder, [RECORD, record])
    assert good.error is None
    assert bad.error is not None
    return bad.error.removeprefix("line 2 of x.jsonl: ")


@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        {**RECORD, "tools": json.dumps([WEATHER])},
        {**RECORD, "messages": json.dumps(RECORD["messages"])},
        {**RECORD, "messages": CONVERSATION},
    ],
)
def test_calls_and_tools_are_read(tmp_path: Path, record: Any) -> None:
    (row,) = opened(tmp_path, [record])
    assert row.error is None
    assert list(row.messages) == CONVERSATION
    assert row.tools == (WEATHER,)


def test_the_older_shape_of_a_call_is_read(tmp_path: Path) -> None:
    old = {"role": "assistant", "content": None, "function_call": AS_TEXT["function"]}
    (row,) = opened(tmp_path, [{"messages": [USER, old, RESULT]}])
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": CALL["function"]}]


def test_tools_of_a_batch_request_are_the_row_s(tmp_path: Path) -> None:
    (row,) = opened(
        tmp_path, [{"custom_id": "a", "body": {"messages": [USER], "tools": [WEATHER], "tool_choice": "none"}}]
    )
    assert row.tools == (WEATHER,)
    assert row.not_obeyed == (("tool_choice", "none"),)


def test_tools_of_a_table_lose_the_nulls_of_other_tools(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "zone": "UTC"}}}
    records = [{**RECORD, "messages": CONVERSATION}, {"messages": [USER], "tools": [other]}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    first, second = open_input(InputConfig(path=str(tmp_path / "x.parquet")))
    assert (list(first.messages), first.tools) == (CONVERSATION, (WEATHER,))
    assert second.tools == (other,)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"messages": [USER], "tools": "weather"}, "tools must be a list of tools; got 'weather'"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "tools[0] must be a function with a name; got"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0] has tool calls, and its role is user; only"),
        (
            {"messages": [USER, {**CALLS, "tool_calls": [{"id": "x"}]}, RESULT]},
            "messages[1].tool_calls[0] must be the call of a function with a name; got {'id': 'x'}",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}, USER]},
            "messages[1].content must be text; got None",
        ),
        ({"messages": [USER, CALLS]}, "the last of messages is a call of a tool; what the tool answered must follow"),
    ],
)
def test_a_fault_in_tools_is_the_row_s_error(tmp_path: Path, record: Any, error: str) -> None:
    assert error_of(tmp_path, record).startswith(error)


def test_tools_after_first_rows_without_any_are_an_error(tmp_path: Path) -> None:
    rows = list(opened(tmp_path, [{"messages": [USER]}] * 100 + [{"messages": CONVERSATION}]))
    assert rows[99].error is None
    assert rows[100].error is not None
    assert "there are tools or calls of tools, and none in the first rows" in rows[100].error


def test_a_key_tools_that_the_first_rows_lack_is_no_lost_one(tmp_path: Path) -> None:
    late = {"messages": [USER], "tools": [WEATHER]}
    rows = list(opened(tmp_path, [{"messages": [USER]}] * 100 + [late, {"messages": [USER], "tools": None}]))
    assert rows[100].error is not None
    assert "name a column of tools with input.tools" in rows[100].error
    assert rows[101].error is None
    rows = list(opened(tmp_path, [{"messages": [USER]}] * 100 + [late], tools="tools"))
    assert (rows[100].error, rows[100].tools) == (None, (WEATHER,))
    rows = list(opened(tmp_path, [{"messages": CONVERSATION}] * 100 + [late]))  # there are columns for tools
    assert (rows[100].error, rows[100].tools) == (None, (WEATHER,))


def test_a_column_of_tools_is_named_in_the_plan(tmp_path: Path) -> None:
    def note(record: Any, **fields: Any) -> str:
        config = make_config(write_jsonl(tmp_path / "x.jsonl", [record]), input=fields)
        (said,) = describe_input(open_planned_input(config), config)
        return said

    assert note(RECORD) == "tools: the column tools has what the model may call"
    assert note({"prompt": "x", "tools": [WEATHER]}).startswith(
        "tools: the column tools is not read; input.tools=tools"
    )
    assert note({"prompt": "x", "own": [WEATHER]}, tools="own") == "tools: the column own has what the model may call"


def test_a_template_that_knows_tools_writes_them(tiny: Any) -> None:
    _, assembly = engine_of(config_of({"model": str(tiny()), "chat_template": TEMPLATE}))
    ids = assembly.prompter.encode(CONVERSATION, {}, (WEATHER,))["base"]
    assert assembly.prompter.decode(ids) == ("<weather>[user]Is it warm?[assistant](weather Rome)[tool]21 degrees")


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (TEMPLATE.replace(TOOLS, ""), "the chat template of base does not write tools"),
        (TEMPLATE.replace(WRITTEN_CALLS, ""), "the chat template of base does not write tool calls"),
        (
            TEMPLATE.replace(TURN, "{% if m.role != 'tool' %}" + TURN + "{% endif %}"),
            "the chat template of base does not write messages of the role tool",
        ),
    ],
)
def test_a_template_that_leaves_tools_out_fails_the_row(tiny: Any, template: str, error: str) -> None:
    _, assembly = engine_of(config_of({"model": str(tiny()), "chat_template": template}))
    with pytest.raises(RowError, match=error):
        assembly.prompter.encode(CONVERSATION, {}, (WEATHER,))


def test_tools_are_kept_in_the_output_and_read_back(tmp_path: Path, tiny: Any) -> None:
    plan = make_plan(make_config(write_jsonl(tmp_path / "in.jsonl", [RECORD])))
    (row,) = Plan.from_json(plan.to_json()).read_shard(0)
    assert plan.has_tools
    config = config_of({"model": str(tiny()), "chat_template": TEMPLATE}, decoding={"max_new_tokens": 4})
    record = decode(config, [row])[row.row_id]
    assert (record.error, list(record.prompt), record.tools) == (None, CONVERSATION, (WEATHER,))
    table = to_table([record], output_schema([], has_tools=True))
    pq.write_table(table, tmp_path / "part.parquet")
    (again,) = open_input(InputConfig(path=str(tmp_path / "part.parquet"), response="response"))
    assert (again.error, list(again.messages), again.tools) == (None, CONVERSATION, (WEATHER,))
    assert again.response == record.response


def test_pairs_have_the_tools_of_their_rows(tmp_path: Path) -> None:
    record = replace(
        answer(Row("a", (USER,), tools=(WEATHER,))), tools=(WEATHER,), original_rewards={}, chosen="x", rejected="y"
    )
    table = to_table([record], output_schema(["a"], has_tools=True, has_response=True))
    (pair,) = pq.read_table(pa.BufferReader(pairs_bytes(table))).to_pylist()
    assert json.loads(pair["tools"]) == [WEATHER]


def test_a_run_without_tools_has_no_columns_for_them(tmp_path: Path) -> None:
    plan = make_plan(make_config(write_jsonl(tmp_path / "x.jsonl", [{"messages": [USER]}])))
    assert not plan.has_tools
    assert not [key for key in plan.fingerprint if key in ("input.tools", "input.format", "input.last_assistant")]
    (row,) = to_table([answer(Row("a", (USER,)))], output_schema([])).to_pylist()
    assert row["prompt"] == [USER]
    assert "tools" not in row
