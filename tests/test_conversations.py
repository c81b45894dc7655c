"""Conversations as people have them: shapes of messages, recognised formats, and what a last answer means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.decoding import config_of, decode, engine_of
from support.storage import make_config, write_jsonl

from pipeline.config.sections import InputConfig
from pipeline.errors import ConfigurationError
from pipeline.inputs.notes import describe_input
from pipeline.inputs.record_formats import FORMATS
from pipeline.inputs.source import InputSource, open_input
from pipeline.records import Row
from pipeline.storage.plan import Plan, make_plan, open_planned_input

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: So."
TURNS = [USER, ANSWER, {"role": "user", "content": "Why?"}]


def opened(folder: Path, records: list[Any], **fields: Any) -> InputSource:
    return open_input(InputConfig(path=str(write_jsonl(folder / "x.jsonl", records)), **fields))


def read(folder: Path, record: Any, **fields: Any) -> Row:
    (row,) = opened(folder, [record], **fields)
    assert row.error is None
    return row


def notes_of(folder: Path, records: list[Any], **fields: Any) -> list[str]:
    config = make_config(write_jsonl(folder / "x.jsonl", records), input=fields)
    return list(describe_input(open_planned_input(config), config))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}], "a b"),
        ([{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"text": "b"}, "c"]}], "abc"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "image_url": None}]}], "a"),
        (json.dumps([{"role": "user", "content": "a"}]), "a"),
        ([{"from": "human", "value": "a"}], "a"),
        ([{"from": "user", "value": "a", "role": None, "content": None}], "a"),
        ("\n\nHuman: a\n\nAssistant:", "a"),
    ],
)
@pytest.mark.parametrize("column", ["messages", "prompt"])
def test_every_shape_of_messages_is_read(tmp_path: Path, messages: Any, expected: str, column: str) -> None:
    if column == "prompt" and isinstance(messages, str) and not messages.startswith("["):
        assert read(tmp_path, {"prompt": messages}).messages == ({"role": "user", "content": messages},)
    else:
        assert read(tmp_path, {column: messages}).messages == ({"role": "user", "content": expected},)


@pytest.mark.parametrize(
    "speaker",
    [
        "system",
        "human",
        "user",
        "gpt",
        "assistant",
        "chatgpt",
        "bard",
        "bing",
        "model",
        "tool",
        "observation",
        "prompter",
        "ai",
        "bot",
        "Human",
        "GPT",
        "function",
        "function_response",
        "tool_response",
    ],
)
def test_every_speaker_of_sharegpt_has_a_role(tmp_path: Path, speaker: str) -> None:
    row = read(tmp_path, {"conversations": [{"from": speaker, "value": "x"}, {"from": "human", "value": "y"}]})
    answers = dict.fromkeys(("observation", "function", "function_response", "tool_response"), "tool")
    role = {"human": "user", "prompter": "user", **answers}.get(speaker.lower(), speaker.lower())
    role = "assistant" if role not in ("system", "user", "tool") else role
    assert row.messages == ({"role": role, "content": "x"}, {"role": "user", "content": "y"})


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_every_role_is_kept(tmp_path: Path, role: str) -> None:
    said = {"role": role, "content": "x"}
    assert read(tmp_path, {"messages": [said, USER]}).messages == (said, USER)


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize("speaker", ["function_call", "function-call", "tool_call"])
@pytest.mark.parametrize(
    ("value", "calls"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', [CALL]),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', [CALL]),
        ('[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]', [CALL, None]),
    ],
)
def test_calls_of_sharegpt_are_calls(tmp_path: Path, speaker: str, value: str, calls: list[Any]) -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "x"},
            {"from": speaker, "value": value},
            {"from": "observation", "value": "7"},
            {"from": "human", "value": "y"},
        ]
    }
    messages = read(tmp_path, record).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
    assert messages[1]["content"] == ""
    assert messages[1]["tool_calls"][0] == calls[0]
    assert len(messages[1]["tool_calls"]) == len(calls)
    assert messages[2]["content"] == "7"


@pytest.mark.parametrize("value", ["f(x)", "", "[]", "7", None, "[7]"])
def test_a_call_of_sharegpt_that_is_none_is_the_row_s_error(tmp_path: Path, value: Any) -> None:
    said = [
        {"from": "human", "value": "x"},
        {"from": "function_call", "value": value},
        {"from": "human", "value": "y"},
    ]
    (row,) = opened(tmp_path, [{"conversations": said}])
    error = row.error
    assert error is not None
    assert "conversations[1].value must be the call of a function, {name, arguments}, as JSON text" in error


def test_the_older_role_of_an_answer_to_a_call_is_read(tmp_path: Path) -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    answered = {"role": "function", "name": "f", "content": "7"}
    messages = read(tmp_path, {"messages": [USER, called, answered, USER], "tools": [CALL]}).messages
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages[2] == {"role": "tool", "name": "f", "content": "7"}


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[]", '["a"]', '[{"role": "user"}]', '[{"role": "user", "content": "a"}] what is this?', "[x"]
)
def test_a_prompt_that_looks_like_a_list_stays_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, {"prompt": text}).messages == ({"role": "user", "content": text},)


def test_the_plan_says_where_a_prompt_is_json_text(tmp_path: Path) -> None:
    records = [{"prompt": json.dumps([USER])}, {"prompt": "hello"}, {"prompt": json.dumps([USER, ANSWER, USER])}]
    assert "prompt: text that is the JSON of messages is read as a conversation (2 in the 3 rows)" in notes_of(
        tmp_path, records
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_field_of_its_own_is_counted(tmp_path: Path, key: str) -> None:
    said = {**ANSWER, key: "hm"}
    records = [{"messages": [USER, said, USER]}, {"messages": json.dumps([USER, said, USER])}, {"messages": [USER]}]
    assert [len(row.messages) for row in opened(tmp_path, records)] == [3, 3, 1]
    (note,) = (note for note in notes_of(tmp_path, records) if "reasoning" in note)
    assert note.endswith("(reasoning_content, reasoning, thinking) is not read (2 in the 3 rows)")


def test_names_of_speakers_are_dropped_and_counted(tmp_path: Path) -> None:
    records = [{"messages": [{**USER, "name": "Bo"}, {**USER, "name": "Al"}]}, {"messages": [{**USER, "name": None}]}]
    assert [row.messages for row in opened(tmp_path, records)] == [(USER, USER), (USER,)]
    assert notes_of(tmp_path, records) == ["messages: the names of speakers are dropped (2 in the 2 rows)"]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.json_()])
def test_messages_are_read_from_text_columns(tmp_path: Path, type_: pa.DataType) -> None:
    text = pa.array([json.dumps([USER]), json.dumps([USER, ANSWER])])
    array = pa.ExtensionArray.from_storage(type_, text) if isinstance(type_, pa.JsonType) else text.cast(type_)
    pq.write_table(pa.table({"messages": array}), tmp_path / "x.parquet")
    first, second = open_input(InputConfig(path=str(tmp_path / "x.parquet")))
    assert (first.messages, first.response) == ((USER,), None)
    assert (second.messages, second.response) == ((USER,), "Hello.")


RECORDS: list[tuple[str, dict[str, Any], list[Any], str]] = [
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        [USER],
        "Hello.",
    ),
    (
        "sharegpt",
        {"conversations": [USER, ANSWER], "system": "Be kind."},
        [{"role": "system", "content": "Be kind."}, USER],
        "Hello.",
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, [USER], "Hello."),
    (
        "alpaca",
        {"instruction": "Sum", "input": "1 2", "output": "3"},
        [{"role": "user", "content": "Sum\n\n1 2"}],
        "3",
    ),
    (
        "alpaca",
        {"instruction": "Why?", "output": "So.", "history": [["Hi", "Hello."]], "system": None},
        TURNS,
        "So.",
    ),
    ("hh-rlhf", {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + "!"}, TURNS, "So."),
    ("hh-rlhf", {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "No."}]}, [USER], "Hello."),
    (
        "ultrafeedback",
        {
            "instruction": "Hi",
            "completions": [
                {"response": "No.", "overall_score": 2.0},
                {"response": "Hello.", "overall_score": 7.5},
                {"response": "?", "overall_score": None},
            ],
        },
        [USER],
        "Hello.",
    ),
    (
        "ultrafeedback-binarized",
        {
            "prompt": "Hi",
            "messages": [USER, ANSWER],
            "chosen": [USER, ANSWER],
            "rejected": [USER, ANSWER],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        [USER],
        "Hello.",
    ),
    (
        "ultrafeedback-preferences",
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER], "chosen-rating": 5.0, "rejected-rating": 1.0},
        [USER],
        "Hello.",
    ),
    (
        "helpsteer2",
        {
            "prompt": "Hi<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?",
            "response": "So.",
            **dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 3),
        },
        TURNS,
        "So.",
    ),
    (
        "pku-saferlhf",
        {
            "prompt": "Hi",
            "response_0": "No.",
            "response_1": "Hello.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        [USER],
        "Hello.",
    ),
]


@pytest.mark.parametrize(("name", "record", "messages", "answer"), RECORDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_known_formats_are_recognised_by_their_columns(
    tmp_path: Path, name: str, record: dict[str, Any], messages: list[Any], answer: str, suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [record])
    else:
        pq.write_table(pa.Table.from_pylist([record]), path)
    source = open_input(InputConfig(path=str(path)))
    (row,) = source
    assert source.columns.format == name
    assert (list(row.messages), row.response, row.error) == (messages, answer, None)
    config = make_config(path)
    plan = make_plan(config)
    assert plan.has_response
    assert list(Plan.from_json(plan.to_json()).read_shard(0)) == [row]
    assert describe_input(source, config)[0].startswith(f"format: {name}, recognised by its columns; read are ")
    assert list(open_input(InputConfig(path=str(path), format=name))) == [row]  # type: ignore[arg-type]


def test_every_format_has_a_record_that_is_tested() -> None:
    assert {name for name, *_ in RECORDS} == {each.name for each in FORMATS}


def test_columns_that_are_named_come_before_a_format(tmp_path: Path) -> None:
    record = {"instruction": "Hi", "output": "Hello.", "text": "x"}
    row = read(tmp_path, record, prompt="text")
    assert (row.messages, row.response) == (({"role": "user", "content": "x"},), None)
    assert read(tmp_path, record, response="text").response == "x"
    with pytest.raises(ConfigurationError, match="alpaca reads columns of its own; leave out"):
        opened(tmp_path, [record], prompt="text", format="alpaca")
    with pytest.raises(
        ConfigurationError, match=r"sharegpt needs the columns conversations, which x\.jsonl does not"
    ):
        opened(tmp_path, [record], format="sharegpt")


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"instruction": None, "output": "x"}, "instruction is null"),
        ({"instruction": " ", "output": "x"}, "instruction is empty"),
        ({"output": "x"}, "there is no instruction"),
        ({"instruction": "x", "output": 5}, "output must be text; got 5"),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "history must be a list of pairs of texts; got [['a']]",
        ),
    ],
)
def test_a_fault_in_a_recognised_record_is_the_row_s_error(tmp_path: Path, record: Any, error: str) -> None:
    good = {"instruction": "x", "output": "y"}
    rows = list(opened(tmp_path, [good, record]))
    assert rows[0].error is None
    assert rows[1].error == f"line 2 of x.jsonl: {error}"


CONVERSATION = {"messages": [USER, ANSWER]}


def test_a_last_answer_is_the_existing_one_unless_something_else_is_said(tmp_path: Path) -> None:
    for setting in (None, "response"):
        row = read(tmp_path, CONVERSATION, last_assistant=setting)
        assert (row.messages, row.response) == ((USER,), "Hello.")
    row = read(tmp_path, CONVERSATION, last_assistant="prefill")
    assert (row.messages, row.response) == ((USER, ANSWER), None)
    (row,) = opened(tmp_path, [CONVERSATION], last_assistant="error")
    assert row.error == "line 1 of x.jsonl: the last of messages is the assistant's; it must be the message to answer"


def test_the_plan_has_columns_for_answers_where_the_first_rows_have_some(tmp_path: Path) -> None:
    def has_response(records: list[Any], **fields: Any) -> bool:
        return make_plan(make_config(write_jsonl(tmp_path / "x.jsonl", records), input=fields)).has_response

    plain = {"messages": [USER]}
    assert has_response([plain] * 99 + [CONVERSATION])
    assert not has_response([plain] * 100 + [CONVERSATION])
    assert has_response([plain], last_assistant="response")
    assert not has_response([CONVERSATION], last_assistant="prefill")
    assert not has_response([CONVERSATION], last_assistant="error")
    assert not has_response([{"prompt": "x"}])
    late = list(opened(tmp_path, [plain] * 100 + [CONVERSATION]))[-1]
    assert late.error is not None
    assert "say with input.last_assistant what it is: response (the existing answer), prefill or error" in late.error


def test_a_last_answer_and_another_existing_answer_do_not_go_together(tmp_path: Path) -> None:
    record = {**CONVERSATION, "old": "Other."}
    (row,) = opened(tmp_path, [record], response="old")
    assert (
        row.error
        == "line 1 of x.jsonl: the last of messages is the assistant's, and there is another existing answer"
    )
    (row,) = opened(tmp_path, [record], response="old", last_assistant="prefill")
    assert row.error is not None
    assert row.error.endswith("is the beginning of an answer, and there is an existing answer, too")
    assert read(tmp_path, {**CONVERSATION, "old": "Hello."}, response="old").response == "Hello."


@pytest.mark.parametrize(
    ("chosen", "answer"), [("Hello.", "Hello."), ([ANSWER], "Hello."), ([USER, ANSWER], "Hello.")]
)
def test_an_existing_answer_may_be_a_list_of_messages(tmp_path: Path, chosen: Any, answer: str) -> None:
    for prompt in ("Hi", [USER]):
        row = read(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": chosen}, response="chosen")
        assert (row.messages, row.response) == ((USER,), answer)


def test_a_list_that_is_no_answer_to_the_prompt_is_the_row_s_error(tmp_path: Path) -> None:
    (row,) = opened(tmp_path, [{"prompt": "Other", "chosen": [USER, ANSWER]}], response="chosen")
    assert row.error == "line 1 of x.jsonl: response is a conversation with another prompt"
    (row,) = opened(tmp_path, [{"prompt": "Hi", "chosen": [USER]}], response="chosen")
    assert row.error == "line 1 of x.jsonl: the last of response must be the assistant's; its role is user"


def test_our_own_output_is_read_back_with_its_answers(tmp_path: Path) -> None:
    record = {
        "row_id": "a",
        "prompt": [USER],
        "completion": [ANSWER],
        "messages": [USER, ANSWER],
        "response": "Hello.",
    }
    for fields in ({}, {"prompt": "prompt", "response": "response"}, {"prompt": "prompt", "response": "completion"}):
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "part-0.parquet")
        (row,) = open_input(InputConfig(path=str(tmp_path / "part-0.parquet"), id="row_id", **fields))
        assert row == Row("a", (USER,), response="Hello.", file="part-0.parquet", number=0)


def test_an_answer_goes_on_from_its_given_beginning(tiny: Any) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    config = config_of({"model": str(tiny()), "chat_template": template}, decoding={"max_new_tokens": 6})
    begun = {"role": "assistant", "content": "Once upon"}
    _, assembly = engine_of(config)
    encode = assembly.prompter.encode
    base = assembly.prompter.decode(encode((USER, begun), {})["base"])
    assert base == assembly.prompter.decode(encode((USER,), {})["base"]) + "Once upon"
    record = decode(config, [Row("a", (USER, begun))])["a"]
    assert record.error is None
    assert record.prompt == (USER,)
    assert record.num_tokens == 6
    assert record.response is not None
    assert record.response.startswith("Once upon")
    assert len(record.response) > len("Once upon")


@pytest.mark.parametrize("knows", [True, False])
def test_a_developer_is_the_system_where_the_template_does_not_know_the_role(tiny: Any, knows: bool) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}" + (
        "{# developer #}" if knows else ""
    )
    _, assembly = engine_of(config_of({"model": str(tiny()), "chat_template": template}))
    said = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER]
    text = assembly.prompter.decode(assembly.prompter.encode(said, {})["base"])
    assert text == ("[system]a[developer]b[user]Hi" if knows else "[system]a\n\nb[user]Hi")


def test_keys_of_a_format_that_the_first_rows_lack_are_read(tmp_path: Path) -> None:
    first = {"instruction": "add", "output": "o"}
    late = {"instruction": "add", "input": "1 and 2", "system": "Be exact.", "output": "3"}
    *_, row = open_input(InputConfig(path=str(write_jsonl(tmp_path / "x.jsonl", [first] * 100 + [late]))))
    assert (row.error, [each["content"] for each in row.messages]) == (None, ["Be exact.", "add\n\n1 and 2"])


def test_columns_that_the_first_rows_lack_can_be_named(tmp_path: Path) -> None:
    late = {"prompt": "y", "w": {"a": 2}, "k": {"date": "today"}}
    path = str(write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x"}] * 100 + [late]))
    *_, row = open_input(InputConfig(path=path, weights="w", chat_template_kwargs="k"), ("a",))
    assert (row.error, row.weights, row.template_kwargs) == (None, {"a": 2.0}, {"date": "today"})
    with pytest.raises(ConfigurationError, match=r"there is no column 'v'; columns of x\.jsonl: 'prompt', 'w'"):
        open_input(InputConfig(path=path, weights="v", response="w"), ("a",))


def test_values_for_templates_that_the_first_rows_lack_are_no_lost_ones(tmp_path: Path) -> None:
    records = [{"prompt": "x"}] * 100 + [{"prompt": "y", "chat_template_kwargs": {"a": 1}}]
    records += [{"prompt": "z", "chat_template_kwargs": {}}]
    rows = list(open_input(InputConfig(path=str(write_jsonl(tmp_path / "x.jsonl", records)))))
    assert [row.error is None for row in rows] == [True] * 100 + [False, True]
    assert "name it with input.chat_template_kwargs" in str(rows[100].error)
