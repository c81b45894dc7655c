"""`cage plan` shows what each role will read, and what is odd about templates, before any model is loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support import tiny_models
from support.chat_templates import FAMILIES, GEMMA2, LLAMA32, NAMED, PHI3_MINI, SPECIAL
from support.decoding import NOWHERE, ask
from tokenizers.processors import TemplateProcessing

from jobs.commands import plan_prompts
from jobs.commands.plan_prompts import describe_context, describe_prompts
from pipeline.config.files import parse_config
from pipeline.errors import RowError
from pipeline.runtime.assembly import load_assembly
from pipeline.runtime.prompt_preview import PromptPreviewer, template_notes
from pipeline.runtime.replica_plan import plan_replica
from pipeline.stages.relabel import prepare

KIND = {"kind": {"kind": "prompted", "principle": "be kind"}}


@pytest.fixture
def planned(tmp_path):
    """planned(template, principals, rows) is the plan of a run and of its replica."""

    def make(template, principals=KIND, rows=({"prompt": "hello"},), base=None, decoding=None, response=None):
        tokenizer = tiny_models.make_tokenizer(chat_template=template)
        tokenizer.add_special_tokens({**NAMED, "additional_special_tokens": list(SPECIAL)})
        folder = tiny_models.make_model(tmp_path / "model", tokenizer=tokenizer)
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = parse_config(
            {
                "input": {"path": str(tmp_path / "in.jsonl"), "response": response},
                "output": {"path": str(tmp_path / "run")},
                "base": {"model": str(folder), **(base or {})},
                "principals": principals,
                "decoding": decoding or {},
            }
        )
        prepared = prepare(config, NOWHERE)
        return prepared.plan, plan_replica(config, prepared.models, NOWHERE)

    return make


@pytest.mark.parametrize("family", [*FAMILIES, None])
def test_the_plan_shows_the_tokens_that_the_run_reads(family, planned):
    _, replica = planned(FAMILIES[family][0] if family else None)
    row = ask("a", "naïve 日本 <|im_end|> </s>")
    previews = PromptPreviewer(replica).prompts(row)
    prompter = load_assembly(replica).prompter
    prompts = prompter.encode(row.messages, replica.topology.weights)
    for name, ids in prompts.items():
        tokens = [prompter.token_text(each) for each in ids]
        special = {*tokens} & {*SPECIAL, *tiny_models.SPECIAL}
        assert previews[name].num_tokens == len(ids)
        assert previews[name].special_tokens == {each: tokens.count(each) for each in special}
        assert "naïve 日本 <|im_end|> </s>" in previews[name].text


@pytest.mark.parametrize("begun", ["Sure, ", "Sure,", "  Sure"])
def test_the_plan_shows_a_prompt_that_ends_with_the_beginning_of_the_answer(begun, planned):
    _, replica = planned(FAMILIES["chatml"][0])
    row = replace(
        ask("a", "hello"), messages=({"role": "user", "content": "hello"}, {"role": "assistant", "content": begun})
    )
    prompter = load_assembly(replica).prompter
    ids = prompter.encode(row.messages, replica.topology.weights)["base"]
    text = PromptPreviewer(replica).prompts(row)["base"].text
    assert text == "".join(map(prompter.token_text, ids)).replace("�", "")
    assert text.endswith(begun)


def test_the_plan_shows_one_conversation_for_every_role(planned):
    text = describe_prompts(*planned(PHI3_MINI, rows=({"prompt": "hello"}, {"prompt": "more"})))
    assert "note      system messages are left out by the chat template of base, kind: principles and" in text
    assert "[base]\n<s><|user|>\nhello<|end|>\n<|assistant|>\n" in text
    assert "[kind]\n<s><|user|>\nbe kind\n\nhello<|end|>\n<|assistant|>\n" in text
    assert "<s>, <|user|>, <|end|>, <|assistant|>" in text
    assert "more" not in text


def test_the_first_row_that_can_be_read_is_shown_with_the_reason_of_those_before(planned):
    rows = ({"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "x"}]},) * 2
    rows += ({"messages": [{"role": "user", "content": "hello"}]},)
    text = describe_prompts(*planned(GEMMA2, {}, rows))
    assert (
        "in.jsonl:3; rows before it fail: the chat template of base refused the messages: Conversation roles" in text
    )
    assert "<start_of_turn>user\nhello<end_of_turn>" in text
    text = describe_prompts(*planned(GEMMA2, {}, rows[:2]))
    assert "none of the first rows can be read: the chat template of base refused" in text


def test_long_prompts_are_shown_shortened(planned, monkeypatch):
    monkeypatch.setattr(plan_prompts, "MAX_SHOWN", 100)
    text = describe_prompts(*planned(PHI3_MINI, {}, ({"prompt": "a" * 60 + "b" * 200 + "c" * 60},)))
    begin, end = "<s><|user|>\n" + "a" * 38, "c" * 28 + "<|end|>\n<|assistant|>\n"
    assert f"[base]\n{begin}\n[" in text
    assert f" characters]\n{end}" in text
    assert "b" * 50 not in text


@pytest.mark.parametrize(
    ("template", "principals", "note"),
    [
        (GEMMA2, KIND, "system messages are refused by the chat template of base, kind"),
        (None, KIND, "the tokenizer of base has no chat template: base, kind reads the text of a single message"),
        (LLAMA32, KIND, "chat templates ask for the time; all prompts have that of the run's beginning"),
        (
            PHI3_MINI,
            {"kind": {**KIND["kind"], "template": "{{ principle }}!"}},
            "principals.kind.template uses no messages: kind reads the same prompt in every row",
        ),
        (
            PHI3_MINI,
            {"pair": {"kind": "tuned_pair", "model": "MODEL", "reference": "MODEL", "template": "always"}},
            "principals.pair.template uses neither messages nor principle: pair reads the same prompt in every row",
        ),
    ],
)
def test_what_is_odd_about_a_template_is_said(template, principals, note, planned, tmp_path):
    principals = json.loads(json.dumps(principals).replace("MODEL", str(tmp_path / "model")))
    _, replica = planned(template, principals)
    assert note in "\n".join(template_notes(replica))


@pytest.mark.parametrize(
    ("written", "given", "is_noted"),
    [("", True, True), ("{{ bos_token }}", True, False), ("", False, False)],
)
def test_a_given_template_without_the_token_that_begins_texts_is_noted(
    written, given, is_noted, planned, monkeypatch
):
    """A template of the model's own is as the model was trained; one that a user wrote may forget the token."""
    made = tiny_models.make_tokenizer

    def beginning(**options):
        tokenizer = made(**options)
        tokenizer.bos_token = tiny_models.EOS
        token_id = tokenizer.convert_tokens_to_ids(tiny_models.EOS)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tiny_models.EOS} $A", special_tokens=[(tiny_models.EOS, token_id)]
        )
        return tokenizer

    monkeypatch.setattr(tiny_models, "make_tokenizer", beginning)
    monkeypatch.setitem(NAMED, "bos_token", tiny_models.EOS)
    template = written + "USER: {{ messages[-1].content }} ASSISTANT:"
    plan, replica = planned(None if given else template, {}, base={"chat_template": template} if given else {})
    said = "the prompts of base do not begin with </s>" in describe_prompts(plan, replica).replace(
        tiny_models.EOS, "</s>"
    )
    assert said is is_noted


def test_nothing_is_said_about_usual_templates(planned):
    for family in ("chatml", "llama3", "zephyr"):
        _, replica = planned(FAMILIES[family][0])
        assert list(template_notes(replica)) == []


def test_the_plan_says_what_becomes_of_reasoning(planned):
    _, replica = planned(FAMILIES["qwen3"][0])
    assert list(template_notes(replica)) == [
        "the base may reason before it answers (<think> ... </think>): its reasoning is the column reasoning, and no "
        "part of response, principals steer both"
    ]
    _, replica = planned(FAMILIES["qwen3"][0], decoding={"thinking": {"steer": False, "max_tokens": 9}})
    (note,) = template_notes(replica)
    assert note.endswith("principals leave it alone, it is closed after 9 tokens")


def test_a_template_of_the_configuration_is_used_where_the_tokenizer_has_none(planned):
    _, replica = planned(None, base={"chat_template": FAMILIES["chatml"][0]})
    assert list(template_notes(replica)) == [
        "the tokenizer of base has no chat template; one of the configuration or of the base is used"
    ]


def test_a_row_that_cannot_be_read_has_no_prompts(planned):
    _, replica = planned(PHI3_MINI)
    with pytest.raises(RowError, match="broken"):
        PromptPreviewer(replica).prompts(ask("a", "x", error="broken"))


def test_tools_are_in_the_prompt_that_is_shown(planned):
    template = "{{ tools | tojson if tools else '' }}{% for message in messages %}{{ message.content }}{% endfor %}"
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    rows = [{"messages": [{"role": "user", "content": "hello"}], "tools": [tool]}]
    assert '{"type": "function", "function": {"name": "weather"' in describe_prompts(*planned(template, {}, rows))


def test_the_plan_says_how_rows_fit_into_the_context(planned):
    rows = [
        {"prompt": "a" * 100, "answer": "b" * 20},
        {"prompt": "a" * 450, "answer": "b" * 20},  # leaves less than 60 tokens of 512
        {"prompt": "a" * 495, "answer": "b" * 20},  # and less than the answer
        {"prompt": "a" * 600, "answer": "b" * 20},
    ]
    limit = {"max_new_tokens": 60}
    shown = describe_prompts(*planned(tiny_models.CHAT_TEMPLATE, {}, rows[:1], decoding=limit))
    assert "context   all 1 rows fit, with max_new_tokens (60)" in shown
    plan, replica = planned(tiny_models.CHAT_TEMPLATE, {}, rows, decoding=limit, response="answer")
    context = describe_context(plan, replica, PromptPreviewer(replica))
    assert context.startswith("of all 4 rows 1 (25 %) fail, the first because the prompt has ")
    assert (
        "; 2 (50 %) have less than max_new_tokens (60) left in some context, so their answers may be cut" in context
    )
    assert context.endswith(
        "; 1 (25 %) have an existing answer that does not fit into some context and is not compared"
    )


def test_of_a_large_input_rows_from_all_over_are_looked_at(planned):
    rows = [{"prompt": "a" * (600 if at == 930 else 9)} for at in range(1000)]
    plan, replica = planned(tiny_models.CHAT_TEMPLATE, {}, rows)
    plan = replace(
        plan, shards=[replace(plan.shards[0], index=at, start=10 * at, stop=10 * at + 10) for at in range(100)]
    )
    monitored = []

    class Reader:
        shards, num_rows = plan.shards, 1000

        def read_shard(self, index):
            monitored.append(index)
            yield from [ask("x", "hello")] * 10

    context = describe_context(Reader(), replica, PromptPreviewer(replica))
    assert context.startswith("100 rows from all over the input fit")
    assert len(monitored) == 20
    assert max(monitored) >= 90


def test_the_plan_says_which_columns_are_read_and_for_what(planned, tmp_path):
    planned(tiny_models.CHAT_TEMPLATE, rows=[{"prompt": "hello", "key": "a", "topic": 3, "old": "b"}])
    tree = {
        "input": {"path": str(tmp_path / "in.jsonl"), "id": "key", "response": "old"},
        "output": {"path": str(tmp_path / "run")},
        "base": {"model": str(tmp_path / "model")},
        "principals": KIND,
    }
    columns = prepare(parse_config(tree), NOWHERE).columns
    assert columns == "columns: prompt (the prompt), key (row ids), old (the existing answer); not read: topic"
    unnamed = parse_config({**tree, "input": {"path": str(tmp_path / "in.jsonl")}})
    assert "rows are named by file and number" in prepare(unnamed, NOWHERE).columns
