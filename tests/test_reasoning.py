"""Models that reason before they answer: where the reasoning is, who steers it, what closes it, what leaves it."""

from __future__ import annotations

import sys

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from support import tiny_models
from support.chat_templates import GPT_OSS, NAMED, QWEN3, SPECIAL
from support.decoding import NOWHERE, ask, config_of, decode, engine_of
from support.sampling_hosts import ROWS as SUPPORT_ROWS
from support.sampling_hosts import LoneHost, assert_same, config_of_lone_host

from pipeline.aligner import Aligner
from pipeline.config.files import parse_config
from pipeline.engine.choices import ChoiceEngine
from pipeline.engine.engine import decode_rows
from pipeline.engine.reasoning import Phase
from pipeline.errors import ConfigurationError, HostError, RunMismatch
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.evaluation.panel import resolve_panel
from pipeline.evaluation.scores import ScoreFiles
from pipeline.evaluation.systems import read_systems
from pipeline.hub.reasoning import HARMONY, find_reasoning
from pipeline.hub.tokenizer_facts import TokenizerFacts
from pipeline.protocol.hosts import Hosts, Reply
from pipeline.protocol.messages import Candidates
from pipeline.records import FinishReason, Row
from pipeline.reporting.page import render_report
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import LocalSamplingHost, start_hosts
from pipeline.sampling.games import solve_and_sample
from pipeline.stages.relabel import relabel
from pipeline.storage.plan import Plan
from pipeline.synthesis.candidates import data_files, read_candidates

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
OPENS = "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
THINKS = TURN.replace("m.content", "m.content.split('</think>')[-1]") + ASKS
OPENED = TURN.replace("m.content", "m.content.split('</think>')[-1]") + OPENS
HUNYUAN = THINKS + "{# <answer> </answer> #}"
COHERE = THINKS.replace("</think>", "<|END_THINKING|>")
MAGISTRAL = THINKS.replace("</think>", "[/THINK]")
SEED = THINKS.replace("</think>", "</seed:think>")
GRANITE = TURN + ASKS + "{# Here is my thought process: ... Here is my response: #}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """model(template, tokens) is a folder with a tiny model whose tokenizer has the tokens of the markers."""
    made = {}

    def make(template, *markers, special=False):
        key = (template, markers, special)
        if key not in made:
            tokenizer = tiny_models.make_tokenizer(chat_template=template)
            tokenizer.add_special_tokens({**NAMED, "additional_special_tokens": list(SPECIAL)})
            tokenizer.eos_token = tiny_models.EOS if "<|channel|>" not in template else "<|return|>"
            tokenizer.add_tokens(list(markers), special_tokens=special)
            made[key] = tiny_models.make_model(tmp_path_factory.mktemp("m"), context=1024, tokenizer=tokenizer)
        return made[key]

    return make


THINK = ("<think>", "</think>")


class ScriptedHost:
    """A host that samples (`Samples`) a script, whatever it is sent; it keeps what it was sent and the weights."""

    runs_ahead = False

    def __init__(self, script, options):
        self.script, self.options = script, options
        self.sent, self.weights = [], []

    def advance(self, at, step):
        self.sent += step.tokens

    def advance_and_sample(self, at, step, slots, terms, uniforms):
        self.advance(at, step)
        self.weights.append(terms[0].weights)
        ids = torch.tensor([[self.script[len(self.sent)], 7]])
        logprobs = torch.tensor([[0.0, -1e4]])
        proposal = Candidates(ids, logprobs, torch.ones(1), logprobs[:, None])
        rewards = [torch.tensor([[1.0, 0.0]]) for _ in terms[0].weights]
        return Reply.of(solve_and_sample(self.options, proposal, rewards, terms, uniforms).outcomes(terms))

    def score(self, prompts, answer, weights=()):
        """Every token is worth a nat to every principal."""
        values = torch.zeros(len(prompts), len(answer))
        values[1:] = 1.0
        return values


def say(folder, text, row=None, **decoding):
    """Decode one row of a model that writes `text` and ends; the record, and the host."""
    assembly = assemble(
        config_of(folder, PAIR, decoding={"trace": "tokens", "draft": "off", **decoding}, cluster={"slots": 1}),
        NOWHERE,
    )
    ids = assembly.prompter._ids(text)
    host = ScriptedHost([*ids, *[assembly.prompter._end_id] * 9], assembly.config.decoding.sampling)
    engine = make_engine(assembly, Hosts.lone(LocalSamplingHost(host, assembly.topology.hosts[0]), runs_ahead=False))
    (record,) = decode_rows(engine, [row or ask("a", "hello")])
    return record, host


def facts(*added, special=()):
    tokens = dict(enumerate((*added, *special)))
    return TokenizerFacts(tokens, 0, None, {}, {}, frozenset(tokens))


@pytest.mark.parametrize(
    ("template", "tokens", "start", "end"),
    [
        ("{{ x.split('</think>')[-1] }}", (), "<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, MiniMax, ...
        ("'<think>\n'", (), "<think>", "</think>"),
        ("<|START_THINKING|>", (), "<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
        ("<seed:think>", (), "<seed:think>", "</seed:think>"),  # Seed-OSS
        ("[THINK]", (), "[THINK]", "[/THINK]"),  # Magistral
        ("<reasoning>", (), "<reasoning>", "</reasoning>"),
        ("<thinking>", (), "<thinking>", "</thinking>"),  # Reflection
        ("</thought>", (), "<thought>", "</thought>"),  # EXAONE Deep
        ("<SCRATCHPAD>", (), "<SCRATCHPAD>", "</SCRATCHPAD>"),  # Hermes 3
        ("<longcat_think>", (), "<longcat_think>", "</longcat_think>"),
        ("<|begin_of_thought|>", (), "<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
        ("<|thought_start|>", (), "<|thought_start|>", "<|thought_end|>"),
        ("<|channel>thought <channel|>", (), "<|channel>thought", "<channel|>"),  # Gemma 4
        ("\u25c1think\u25b7 \u25c1/think\u25b7", (), "\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL-Thinking
        (
            "Here is my thought process: Here is my response:",
            (),
            "Here is my thought process:",
            "Here is my response:",
        ),
        ("nothing of it", ("<think>", "</think>"), "<think>", "</think>"),  # known by the tokenizer alone
        ("nothing", ("[THINK]", "[/THINK]"), "[THINK]", "[/THINK]"),
        ("<thinking> and <think>", ("<think>", "</think>"), "<think>", "</think>"),  # its own token is what it writes
    ],
)
def test_markers_are_found_in_the_template_or_the_tokenizer(template, tokens, start, end):
    found = find_reasoning(template, facts(*tokens))
    assert (found.start, found.end) == (start, end)


@pytest.mark.parametrize(
    ("template", "tokens"),
    [(None, ()), ("{{ messages }}", ("<|im_end|>", "<tool_call>")), ("I think of <i>", ()), ("x", ("<think>",))],
)
def test_a_model_without_markers_does_not_reason(template, tokens):
    assert find_reasoning(template, facts(*tokens)) is None


def test_gpt_oss_is_known_by_its_template_and_its_tokens():
    assert find_reasoning(GPT_OSS, facts("<|channel|>", "<|message|>", "<|end|>")) == HARMONY


CASES = {
    "block": (THINKS, THINK, "<think>\nwell, hm\n</think>\n\nyes", "well, hm", "yes"),
    "blank before": (THINKS, THINK, "\n<think>hm</think>yes", "hm", "yes"),
    "empty block": (THINKS, THINK, "<think>\n\n</think>\n\nyes", "", "yes"),
    "no block": (THINKS, THINK, "yes", None, "yes"),
    "a block that is spoken of": (THINKS, THINK, "write <think> to think", None, "write <think> to think"),
    "closed, never opened": (THINKS, THINK, "hm, well</think>\nyes", "hm, well", "yes"),
    "opened by the prompt": (OPENED, THINK, "hm, well\n</think>\n\nyes", "hm, well", "yes"),
    "opened twice": (OPENED, THINK, "<think>\nhm\n</think>\nyes", "hm", "yes"),
    "as text": (THINKS, (), "<think>ä hm</think>yes", "ä hm", "yes"),
    "as text, opened": (OPENED, (), "ä hm</think>yes", "ä hm", "yes"),
    "code keeps its indentation": (THINKS, THINK, "<think>hm</think>\n\n  if x:", "hm", "  if x:"),
    "wrapped answer": (HUNYUAN, THINK, "<think>\nhm\n</think>\n<answer>\nyes\n</answer>", "hm", "yes"),
    "magistral": (MAGISTRAL, ("[THINK]", "[/THINK]"), "[THINK]hm[/THINK]yes", "hm", "yes"),
    "seed": (SEED, ("<seed:think>", "</seed:think>"), "<seed:think>hm</seed:think>yes", "hm", "yes"),
    "granite": (GRANITE, (), "Here is my thought process: hm\nHere is my response: yes", "hm", " yes"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_reasoning_is_kept_beside_the_answer(case, model):
    template, markers, text, reasoning, answer = CASES[case]
    record, _ = say(model(template, *markers), text)
    assert (record.reasoning, record.response) == (reasoning, answer)
    assert record.finish_reason is FinishReason.STOP
    # rewards count the answer alone: 1 nat a token, the end token included
    assert record.rewards["kind"] == record.num_tokens - record.num_reasoning_tokens
    assert (record.num_reasoning_tokens == 0) == (reasoning is None)
    with_it, _ = say(model(template, *markers), text, thinking={"in_answers": True})
    assert with_it.rewards["kind"] == record.num_tokens
    assert with_it.reasoning == reasoning
    if reasoning is not None:
        assert with_it.response == ("<think>\n" if template is OPENED else "") + text


def test_special_tokens_that_mark_reasoning_are_no_text(model):
    folder = model(COHERE, "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", special=True)
    record, _ = say(folder, "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>yes")
    assert (record.reasoning, record.response, record.num_reasoning_tokens) == ("hm", "yes", 4)


ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "reasoning", "answer", "reason"),
    [
        (f"{ANALYSIS}hm{NEXT}{FINAL}yes", "hm", "yes", "stop"),
        (f"{FINAL}yes", None, "yes", "stop"),
        (f"{ANALYSIS}hm{NEXT}{ANALYSIS}well{NEXT}{FINAL}yes", "hm\n\nwell", "yes", "stop"),
        (f"{ANALYSIS}hm{NEXT}<|channel|>commentary<|message|>I look it up", "hm", "I look it up", "stop"),
        ("plain text", None, "plain text", "stop"),
        (f"{ANALYSIS}hm", "hm", "", "reasoning"),
        (f"{ANALYSIS}hm{NEXT}", "hm", "", "reasoning"),
    ],
)
def test_channels_of_gpt_oss(text, reasoning, answer, reason, model):
    record, _ = say(model(GPT_OSS), text)
    assert (record.reasoning, record.response, record.finish_reason) == (reasoning, answer, reason)


def test_a_block_that_never_closes_is_said(model):
    for text, decoding in (("<think>hm", {}), ("<think>" + "hm" * 9, {"max_new_tokens": 12})):
        record, _ = say(model(THINKS, *THINK), text, **decoding)
        assert record.finish_reason is FinishReason.REASONING
        assert record.response == ""
        assert record.reasoning.startswith("hm")
        assert record.num_reasoning_tokens in (3, 12)
        assert record.rewards["kind"] == (1.0 if not decoding else 0.0)  # the end token is no reasoning


def test_stop_strings_are_looked_for_in_the_answer_alone(model):
    text = "<think>a b, c d</think>x y, z"
    record, _ = say(model(THINKS, *THINK), text, stop=[", "])
    assert (record.reasoning, record.response) == ("a b, c d", "x y")
    record, _ = say(model(THINKS, *THINK), text, stop=[", "], thinking={"in_answers": True})
    assert record.response == "<think>a b, c d</think>x y"


@pytest.mark.parametrize(
    ("template", "text", "closing"),
    [
        (THINKS, "<think>" + "hm" * 20, ["</think>"]),
        (OPENED, "hm" * 20, ["</think>"]),
        (
            GPT_OSS,
            ANALYSIS + "hm" * 20,
            ["<|end|>", "<|start|>", *"assistant", "<|channel|>", *"final", "<|message|>"],
        ),
    ],
)
@pytest.mark.parametrize("limit", [0, 1, 5])
def test_max_tokens_closes_the_block_by_its_marker(template, text, closing, limit, model):
    folder = model(template, *THINK) if template is not GPT_OSS else model(template)
    record, host = say(folder, text, thinking={"max_tokens": limit}, max_new_tokens=60)
    assert record.reasoning == ("hm" * 20)[:limit]
    assert record.response == ("hm" * 20)[limit + len(closing) :]  # the script goes on as if nothing had happened
    forced = [token for token in record.tokens if token.base_logprob is None]
    assert [token.text for token in forced] == closing
    assert [token.logprob for token in forced] == [None] * len(closing)
    drawn = [token.token_id for token in record.tokens][: len(host.sent)]
    assert host.sent == drawn  # the host appends what was written, not what it had drawn
    assert record.rewards["kind"] == record.num_tokens - record.num_reasoning_tokens


def test_principals_leave_the_reasoning_alone_where_they_are_told_to(model):
    for template, text, first in ((THINKS, "<think>hm</think>ok", 1), (OPENED, "hm</think>ok", 0)):
        _, host = say(model(template, *THINK), text, thinking={"steer": False})
        inside = [weights == (0.0, 0.0) for weights in host.weights]
        assert inside == [False] * first + [True] * 3 + [False] * 3
    text = f"{ANALYSIS}hm{NEXT}{FINAL}ok"
    record, host = say(model(GPT_OSS), text, thinking={"steer": False})
    assert [weights == (0.0, 0.0) for weights in host.weights] == [True] * record.num_reasoning_tokens + [False] * 3


CLOSED = {"thinking": {"steer": False, "max_tokens": 9}, "max_new_tokens": 16}
SAME = {"trace": "tokens", "agent_temperature": 0.2, "temperature": 1.2}
ROWS = [ask(f"r{at}", "tell me " * (at % 4) + "x" * (at + 1)) for at in range(7)]


def test_the_base_draws_the_reasoning_and_the_game_the_answer(model):
    folder = model(OPENED, *THINK)
    records = decode(config_of(folder, PAIR, decoding={**SAME, **CLOSED}), ROWS)
    alone = decode(config_of(folder, PAIR, decoding={**SAME, **CLOSED, "rule": "base"}), ROWS)
    end, steered = 10, 0  # the limit and the marker
    for row_id, record in records.items():
        twin = alone[row_id]
        ids, others = ([token.token_id for token in each.tokens] for each in (record, twin))
        assert ids[:end] == others[:end]
        inside = record.tokens[:end]
        assert all(payment == pytest.approx(0, abs=1e-9) for token in inside for payment in token.payments.values())
        steered += ids[end:] != others[end:]
        drawn, alone_drawn = ([token.logprob for token in each.tokens[: end - 1]] for each in (record, twin))
        assert drawn == pytest.approx(alone_drawn, abs=1e-9)
    assert steered >= 4


@pytest.mark.parametrize("captures", [False, True])
def test_reasoning_is_the_same_however_its_host_is_sent_steps(captures, model):
    """Ahead or not, in other slots, in another order: the bits of a row are the same."""
    config = config_of_lone_host(model(THINKS, *THINK), thinking={"steer": False, "max_tokens": 5})
    opened = config_of_lone_host(model(OPENED, *THINK), thinking={"steer": False, "max_tokens": 5})
    for each in (config, opened):
        one = LoneHost.start(each, captures=captures)
        ahead, behind = one.decode(runs_ahead=True), one.decode(runs_ahead=False)
        assert ahead == behind
        if not captures:
            cluster = each.cluster.model_copy(update={"slots": 2})
            few = LoneHost.start(each.model_copy(update={"cluster": cluster}), captures=False)
            assert_same(ahead, few.decode(list(reversed(SUPPORT_ROWS)), runs_ahead=True), tolerance=0)


def test_a_row_whose_host_was_lost_in_its_reasoning_gets_the_same_tokens(model):
    other = str(model(OPENED, *THINK))
    config = config_of(
        {"model": other},
        {
            "kind": PAIR["kind"],
            "arm": {"kind": "tuned_pair", "model": str(model(THINKS, *THINK)), "reference": other},
        },
        decoding={**SAME, **CLOSED},
        cluster={"slots": 3},
    )
    whole = decode(config, ROWS)
    engine, assembly = engine_of(config)
    for row in ROWS[:3]:
        engine.admit(row)
    records = []
    for _ in range(9):  # within the reasoning of some rows
        records += engine.step()
    engine.recover(start_hosts(assembly), HostError("lost"))
    records += decode_rows(engine, ROWS[3:])
    assert {record.row_id: record for record in records} == whole


def read_back(assembly, row):
    """What a model reads of a row's existing answer, and the part of it that does not count."""
    prompts = assembly.prompter.encode(row.messages, assembly.topology.weights, (), row.template_kwargs)
    ids, first = assembly.prompter.encode_existing(row, prompts)
    return "".join(map(assembly.prompter.token_text, ids[:first])), "".join(
        map(assembly.prompter.token_text, ids[first:])
    )


@pytest.mark.parametrize(
    ("template", "response", "before", "answer"),
    [
        (QWEN3, "yes", "<think>\n\n</think>\n\n", "yes"),  # as the template writes an answer without reasoning
        (THINKS, "yes", "", "yes"),
        (OPENED, "yes", "\n</think>\n\n", "yes"),  # the prompt opened the block
        (THINKS, "<think>\nhm\n</think>\n\nyes", "<think>\nhm\n</think>\n\n", "yes"),
        (OPENED, "<think>\nhm\n</think>\n\nyes", "hm\n</think>\n\n", "yes"),
        (OPENED, "hm</think>yes", "hm\n</think>\n\n", "yes"),
        (GPT_OSS, "yes", "<|channel|>final<|message|>", "yes"),
    ],
)
def test_an_existing_answer_stands_where_the_template_puts_it(template, response, before, answer, model):
    folder = model(template, *THINK) if template is not GPT_OSS else model(template)
    assembly = assemble(config_of(folder, PAIR), NOWHERE)
    end = assembly.prompter.token_text(assembly.prompter._end_id)
    assert read_back(assembly, ask("a", "hello", response=response)) == (before, answer + end)


def test_a_rows_own_kwargs_decide_whether_the_block_is_written_already(model):
    assembly = assemble(config_of(model(QWEN3, *THINK), PAIR), NOWHERE)
    row = ask("a", "hello", response="yes", template_kwargs={"enable_thinking": False})
    assert read_back(assembly, row)[0] == ""  # the prompt has it


def test_the_new_answer_is_compared_with_the_existing_one_without_reasoning(model):
    row = ask("a", "hello", response="<think>so</think>yes")
    record, _ = say(model(THINKS, *THINK), "<think>hm</think>yes", row=row)
    assert record.response == "yes"
    assert record.original_rewards is not None
    assert record.chosen is None


def test_rewards_of_an_existing_answer_count_the_answer_alone(model):
    folder = model(THINKS, *THINK)
    for in_answers, tokens in ((False, 4), (True, 4 + 6)):
        decoding = {"thinking": {"in_answers": in_answers}, "draft": "off"}
        assembly = assemble(config_of(folder, PAIR, decoding=decoding, cluster={"slots": 1}), NOWHERE)
        script = [*assembly.prompter._ids("<think>ok</think>no"), *[assembly.prompter._end_id] * 3]
        host = ScriptedHost(script, assembly.config.decoding.sampling)
        engine = make_engine(
            assembly, Hosts.lone(LocalSamplingHost(host, assembly.topology.hosts[0]), runs_ahead=False)
        )
        row = ask("a", "hello", response="<think>\nh\n</think>yes")
        (record,) = decode_rows(engine, [row])
        # tokens of "yes" and the end; with its reasoning also <think> newline h newline </think> and a blank line
        assert record.original_rewards["kind"] == pytest.approx(tokens + in_answers)
        assert engine.score(row) == record.original_rewards
        answers = {record.chosen, record.rejected}
        assert answers == ({"no", "yes"} if not in_answers else {"<think>ok</think>no", row.response})


def test_an_answer_that_was_begun_in_its_reasoning_goes_on_there(model):
    begun = (*ask("a", "hello").messages, {"role": "assistant", "content": "<think>so, "})
    record, _ = say(model(TURN + ASKS, *THINK), "hm</think>yes", row=Row("a", begun))
    assert (record.reasoning, record.response, record.prompt) == ("so, hm", "yes", begun[:1])
    begun = (*begun[:1], {"role": "assistant", "content": "<think>so</think>Well, "})
    record, _ = say(model(TURN + ASKS, *THINK), "yes", row=Row("a", begun))
    assert (record.reasoning, record.response) == ("so", "Well, yes")


@pytest.mark.parametrize(
    ("thinking", "message"),
    [
        ({"steer": False}, "decoding.thinking has no effect: neither the chat template nor the tokenizer"),
        ({"max_tokens": 256}, "thinking.max_tokens must be below max_new_tokens .256."),
        ({"max_tokens": -1}, "decoding.thinking.max_tokens"),
        ({"markers": "none", "steer": False}, "with markers: none, steer, max_tokens and in_answers have no effect"),
        ({"markers": ["<a>"]}, "decoding.thinking.markers"),
    ],
)
def test_settings_without_effect_are_refused(thinking, message, tiny):
    with pytest.raises(ConfigurationError, match=message):
        assemble(config_of(tiny(), PAIR, decoding={"thinking": thinking}), NOWHERE)


def test_markers_may_be_named_or_ignored(model, tiny):
    record, _ = say(tiny(), "{{hm}}yes", thinking={"markers": ["{{", "}}"]})
    assert (record.reasoning, record.response) == ("hm", "yes")
    record, _ = say(model(THINKS, *THINK), "<think>hm</think>yes", thinking={"markers": "none"})
    assert (record.reasoning, record.response) == (None, "<think>hm</think>yes")


def run_config(tmp_path, folder, **sections):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "hello"}\n{"id": "b", "prompt": "x", "old": "y"}\n')
    return parse_config(
        {
            "input": {"path": str(tmp_path / "in.jsonl"), "id": "id", "response": "old"},
            "output": {"path": str(tmp_path / "run")},
            "base": {"model": str(folder)},
            "principals": PAIR,
            "decoding": {"max_new_tokens": 12, "thinking": {"max_tokens": 4}},
            "cluster": {"transport": "local"},
            **sections,
        }
    )


def test_a_run_has_columns_for_reasoning_and_its_report_counts_it(tmp_path, model):
    folder = model(OPENED, *THINK)
    run, _ = relabel(run_config(tmp_path, folder), NOWHERE, sys.stderr)
    rows = pq.read_table(tmp_path / "run").to_pylist()
    assert [row["num_reasoning_tokens"] for row in rows] == [5, 5]  # the marker that closed it included
    for row in rows:
        assert row["reasoning"] is not None
        assert row["completion"] == [{"role": "assistant", "content": row["response"]}]
        assert row["messages"][-1]["content"] == row["response"]
        assert "</think>" not in row["response"]
    assert "5.0 tokens per answer" in render_report(run).decode()
    assert "reasoning" in (tmp_path / "run" / "_README.md").read_text()


def test_judges_and_training_data_have_the_answer_alone(tmp_path, model):
    run, _ = relabel(run_config(tmp_path, model(OPENED, *THINK)), NOWHERE, sys.stderr)
    table = pq.read_table(tmp_path / "run")
    panel = resolve_panel(
        {"length": TypeAdapter(AnyJudge).validate_python({"kind": "length", "unit": "tokens"})}, NOWHERE
    )
    scores = ScoreFiles(run, panel)
    for record in scores.pending():
        scores.score(record, panel.load())
    (numbers, judged), *_ = scores.tables()
    rows = table.to_pylist()
    assert numbers["answer_tokens"].to_pylist() == judged["length"].to_pylist()  # comparisons at equal length take it
    assert judged["length"].to_pylist() == [row["num_tokens"] - 5 for row in rows]
    for name in data_files(run):
        for candidate, row in zip(read_candidates(run, name), rows, strict=True):
            assert (candidate.text, candidate.num_tokens) == (row["response"], row["num_tokens"] - 5)


@pytest.mark.parametrize("in_answers", [False, True])
def test_a_comparison_counts_the_tokens_of_what_is_judged(tmp_path, model, in_answers):
    thinking = {"max_tokens": 4, "in_answers": in_answers}
    config = run_config(tmp_path, model(OPENED, *THINK), decoding={"max_new_tokens": 12, "thinking": thinking})
    relabel(config, NOWHERE, sys.stderr)
    rows = pq.read_table(tmp_path / "run").to_pylist()
    (system,) = read_systems([str(tmp_path / "run")])
    for row, answer in zip(rows, system.answers, strict=True):
        assert answer.judged.num_tokens == row["num_tokens"] - (0 if in_answers else row["num_reasoning_tokens"])


class RestartingHost(ScriptedHost):
    """A `ScriptedHost` whose script begins again with every row, behind what its prompt has of the answer."""

    first = None

    def advance(self, at, step):
        for admission in step.admissions:
            length = len(admission.prompts["base"])
            self.first = length if self.first is None else self.first
            self.sent = [0] * (length - self.first)
        super().advance(at, step)


@pytest.mark.parametrize("unit", ["answer", "block"])
@pytest.mark.parametrize("in_answers", [False, True])
def test_judges_that_are_principals_read_what_a_user_reads(model, unit, in_answers):
    """Without reasoning and special tokens, block by block, and its tokens are counted without them as well."""
    judge = {"long": {"kind": "judge", "judge": {"kind": "length"}}}
    decoding = {"unit": unit, "proposals": 2, "thinking": {"in_answers": in_answers}}
    decoding |= {"block_tokens": 3} if unit == "block" else {}
    assembly = assemble(config_of(model(OPENED, *THINK), judge, decoding=decoding, cluster={"slots": 1}), NOWHERE)
    reasoning, answer = assembly.prompter._ids("hm hm</think>"), assembly.prompter._ids("yes, well then")
    script = [*reasoning, *answer, *[assembly.prompter._end_id] * 9]
    host = RestartingHost(script, assembly.config.decoding.sampling)
    hosts = Hosts.lone(LocalSamplingHost(host, assembly.topology.hosts[0]), runs_ahead=False)
    judged = []

    def score(prompt, texts, num_tokens):
        judged.extend(zip(texts, num_tokens, strict=True))
        return [float(len(text)) for text in texts]

    inner = make_engine(assembly, hosts)
    parts = (assembly.topology, assembly.prompter, assembly.config.decoding, assembly.variants)
    (record,) = decode_rows(ChoiceEngine(inner, *parts, {"long": score}), [ask("a", "hello")])
    assert record.num_reasoning_tokens == len(reasoning)
    last_text, last_count = judged[-1]
    if in_answers:
        assert "</think>" in last_text
        return
    assert record.response == last_text == "yes, well then"
    assert last_count == len(answer) + 1  # with the token that ends it
    assert record.rewards["long"] == len(last_text)
    assert all(last_text.startswith(text) for text, _ in judged)
    assert ("" in dict(judged)) == (unit == "block")  # blocks that are reasoning alone


def test_a_run_goes_on_only_with_a_base_that_reasons_as_before(tmp_path, model):
    config = run_config(tmp_path, model(OPENED, *THINK))
    relabel(config, NOWHERE, sys.stderr)
    (tmp_path / "run" / "_SUCCESS").unlink()
    assert relabel(config, NOWHERE, sys.stderr)[1]
    stored = tmp_path / "run" / "_plan.json"
    stored.write_bytes(Plan.from_json(stored.read_bytes()).with_reasoning(None).to_json())
    (tmp_path / "run" / "_SUCCESS").unlink()
    with pytest.raises(RunMismatch, match=r"reasoning.markers: absent -> '<think> ... </think>'"):
        relabel(config, NOWHERE, sys.stderr)


def test_the_python_interface_gives_the_reasoning(model):
    decoding = {"max_new_tokens": 9, "thinking": {"max_tokens": 2}}
    with Aligner(str(model(OPENED, *THINK)), PAIR, slots=2, **decoding) as aligner:
        (answer,) = aligner.generate(["hello"])
    assert answer.reasoning is not None
    assert "</think>" not in answer.text


PIECES = st.sampled_from(["<think>", "</think>", "\n", "h", " ", "<", "think>", "é"])
CHANNELS = st.sampled_from(["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "analysis", "final", "h"])


@pytest.mark.parametrize(("template", "pieces"), [(THINKS, PIECES), (OPENED, PIECES), (GPT_OSS, CHANNELS)])
def test_any_tokens_are_a_turn_and_its_phase_depends_on_them_alone(template, pieces, model):
    assembly = assemble(config_of(model(template, *THINK) if pieces is PIECES else model(template), PAIR), NOWHERE)
    row = ask("a", "hello")
    prompts = assembly.prompter.encode(row.messages, assembly.topology.weights)

    @given(texts=st.lists(pieces, max_size=14))
    @settings(max_examples=60)
    def check(texts):
        tokens = [token for text in texts for token in assembly.prompter._ids(text)]
        track = assembly.prompter.begin_turn(row.messages, prompts)
        seen = []
        for _ in range(2):  # a row that begins again is where it was
            track.reset()
            phases = []
            for count in range(1, len(tokens) + 1):
                track.advance(tokens[:count])
                phases.append(track.phase)
            seen.append((phases, track.read(tokens)))
        assert seen[0] == seen[1]
        phases, turn = seen[0]
        assert 0 <= turn.num_reasoning_tokens <= len(tokens)
        assert turn.text == assembly.prompter.raw_text(tokens)
        assert (turn.reasoning is None) <= turn.is_closed
        if not turn.is_closed:
            assert turn.answer == ""
        if pieces is PIECES and Phase.ANSWER in phases:  # from there on, all is the answer
            assert set(phases[phases.index(Phase.ANSWER) :]) == {Phase.ANSWER}

    check()
