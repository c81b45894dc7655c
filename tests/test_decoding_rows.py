"""What a row's roles read, what ends it, what refuses it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of, decode
from transformers import AutoTokenizer

from pipeline.engine.engine import decode_rows
from pipeline.errors import HostError
from pipeline.protocol.hosts import Hosts, Reply
from pipeline.protocol.messages import Candidates
from pipeline.records import FinishReason, Row
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import LocalSamplingHost
from pipeline.sampling.games import solve_and_sample
from pipeline.worker.loading import load_language_model
from pipeline.worker.sampling_host import SamplingHost

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}


def script_of(folder, answer):
    """The tokens of `answer`, as a model of this tokenizer would draw them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], 0]


class ScriptedHost:
    """A host that samples (`Samples`) a script of tokens: probability one, at every slot."""

    runs_ahead = False

    def __init__(self, script, options):
        self.script, self.options = script, options
        self.at = {}

    def advance(self, at, step):
        for admission in step.admissions:
            self.at[admission.slot] = 0
        for slot, token in zip(step.slots, step.tokens, strict=True):
            assert token == self.script[self.at[slot]]
            self.at[slot] += 1

    def advance_and_sample(self, at, step, slots, terms, uniforms):
        self.advance(at, step)
        ids = torch.tensor([[self.script[self.at[slot]], 7] for slot in slots])
        logprobs = torch.tensor([[0.0, -1e4]] * len(slots))
        proposal = Candidates(ids, logprobs, torch.ones(len(slots)), logprobs[:, None])
        rewards = [torch.zeros(len(slots), 2) for _ in terms[0].weights]
        return Reply.of(solve_and_sample(self.options, proposal, rewards, terms, uniforms).outcomes(terms))


def say(tiny, answer, **decoding):
    """Decode one row of a model that answers `answer`, token by token."""
    folder = tiny()
    assembly = assemble(config_of(folder, PAIR, decoding={"draft": "off", **decoding}, cluster={"slots": 2}), NOWHERE)
    host = ScriptedHost(script_of(folder, answer), assembly.config.decoding.sampling)
    (plan,) = assembly.topology.hosts
    engine = make_engine(assembly, Hosts.lone(LocalSamplingHost(host, plan), runs_ahead=False))
    (record,) = decode_rows(engine, [ask("a", "hello")])
    return record


def test_the_end_token_ends_a_row_and_is_counted_but_not_shown(tiny):
    record = say(tiny, "fine")
    assert (record.response, record.finish_reason, record.num_tokens) == ("fine", FinishReason.STOP, 5)


def test_the_token_limit_ends_a_row(tiny):
    record = say(tiny, "a long story", max_new_tokens=6)
    assert (record.response, record.finish_reason, record.num_tokens) == ("a long", FinishReason.LENGTH, 6)


@pytest.mark.parametrize("stop", ["\n\n", ["never", "\n\n"], ["END", "\n\n", "and"]])
def test_a_stop_string_across_tokens_ends_the_row_before_it(tiny, stop):
    record = say(tiny, "first\n\nsecond and END", stop=stop)
    assert (record.response, record.finish_reason, record.num_tokens) == ("first", FinishReason.STOP, 7)


def test_a_stop_string_of_several_bytes_a_character_is_found(tiny):
    assert say(tiny, "so schön, ja", stop="ö").response == "so sch"


@pytest.mark.parametrize("text", ["schön 🦙 日本語", "🏳️‍🌈", "naïve café"])
def test_characters_split_across_tokens_come_out_whole(tiny, text):
    record = say(tiny, text)
    assert record.response == text
    assert record.num_tokens == len(text.encode()) + 1


def test_a_prompt_longer_than_the_context_is_refused_and_its_neighbours_are_not(tiny):
    folder = tiny("gpt2", context=64)
    rows = [ask("short", "hi"), ask("long", "x" * 200), ask("other", "hello")]
    records = decode(config_of(folder, PAIR, decoding={"max_new_tokens": 100}), rows)
    assert records["long"].is_failed
    assert "context holds 64" in records["long"].error
    for row_id in ("short", "other"):
        record = records[row_id]
        assert not record.is_failed
        assert record.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        # the longest role's prompt and the answer fill the context
        assert record.num_tokens < 64


def test_a_row_that_could_not_be_read_comes_out_with_its_reason(tiny):
    rows = [Row("bad", error="line 3 is not valid UTF-8"), ask("good", "hello")]
    records = decode(config_of(tiny(), PAIR, decoding={"max_new_tokens": 4}), rows)
    assert records["bad"].error == "line 3 is not valid UTF-8"
    assert records["bad"].finish_reason is FinishReason.ERROR
    assert records["good"].error is None


def test_a_conversation_without_a_chat_template_is_refused_by_name_of_the_remedy(tiny, tmp_path):
    from support import tiny_models

    folder = tiny_models.make_model(tmp_path, tokenizer=tiny_models.make_tokenizer(chat_template=None))
    rows = [
        ask("plain", "once upon a time"),
        Row("talk", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                     {"role": "user", "content": "c"})),
    ]  # fmt: skip
    records = decode(config_of(folder, PAIR, decoding={"max_new_tokens": 4}), rows)
    assert records["plain"].error is None
    assert "base.chat_template" in records["talk"].error


def prompts_of(assembly, *messages):
    return assembly.prompter.encode(messages, assembly.topology.weights)


def test_a_template_of_its_own_changes_what_a_principal_reads(tiny):
    template = "{{ principle }}|{{ messages[0].content }}"
    principals = {"own": {"kind": "prompted", "principle": "be kind", "template": template}}
    prompts = prompts_of(assemble(config_of(tiny(), principals), NOWHERE), {"role": "user", "content": "hi"})
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    assert tokenizer.decode(prompts["own"]) == "be kind|hi"
    assert tokenizer.decode(prompts["own.reference"]) == "|hi"
    assert tokenizer.decode(prompts["base"]) == "<|user|>hi<|end|><|assistant|>"


def test_a_principle_joins_the_system_message_that_is_there(tiny):
    messages = ({"role": "system", "content": "You are a cook."}, {"role": "user", "content": "hi"})
    prompts = prompts_of(assemble(config_of(tiny(), PAIR), NOWHERE), *messages)
    assert "You are a cook.\n\nbe kind" in AutoTokenizer.from_pretrained(tiny()).decode(prompts["kind"])


def lone_host(config):
    """An engine over one host that samples, and the model runner of that host."""
    assembly = assemble(config, NOWHERE)
    (spec,), (plan,) = assembly.hosts, assembly.topology.hosts
    runner = load_language_model(spec).slot_runner
    client = LocalSamplingHost(SamplingHost(runner, spec.roles, spec.games), plan)
    return make_engine(assembly, Hosts.lone(client, runs_ahead=False)), runner


def test_a_host_that_fails_is_named_with_its_principals(tiny):
    engine, runner = lone_host(config_of(tiny(), PAIR, decoding={"max_new_tokens": 3}))

    def broken(step):
        raise RuntimeError("device lost")

    runner.advance = broken
    with pytest.raises(HostError, match=r"host base .*serving base, kind, brief.*advance.*device lost"):
        list(decode_rows(engine, [ask("a", "hello")]))


def test_a_model_without_finite_logits_costs_its_rows_not_the_run(tiny):
    engine, runner = lone_host(config_of(tiny(), PAIR, decoding={"max_new_tokens": 3}, cluster={"slots": 2}))
    plain = runner.propose

    @torch.inference_mode()
    def with_nan(slots, **options):
        proposal = plain(slots, **options)
        proposal = replace(proposal, role_logprobs_BRK=proposal.role_logprobs_BRK.clone())
        for at, slot in enumerate(slots):
            if slot == 0:
                proposal.role_logprobs_BRK[at, 1] = torch.nan
        return proposal

    runner.propose = with_nan
    records = {record.row_id: record for record in decode_rows(engine, [ask("a", "hello"), ask("b", "hello")])}
    assert "not finite" in records["a"].error
    assert records["b"].error is None
    alone = decode(config_of(tiny(), PAIR, decoding={"max_new_tokens": 3}), [ask("b", "hello")])
    assert records["b"] == alone["b"]
