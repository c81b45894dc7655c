"""Arithmetic of several models, contrast with a negative principle, and pairs of adapters, against plain passes."""

from __future__ import annotations

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of, decode, engine_of
from support.lora import make_lora
from support.runs import job, parts, run_job, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.commands.plan import describe_plan
from pipeline.errors import ConfigurationError
from pipeline.logits_processor import CageLogitsProcessor
from pipeline.principals.arithmetic import Formula
from pipeline.runtime.assembly import assemble
from pipeline.runtime.replica_plan import plan_replica
from pipeline.stages.relabel import prepare

DECODING = {"max_new_tokens": 8, "trace": "tokens", "agent_temperature": 0.5}


@torch.no_grad()
def plain(assembly, role, model, answer):
    """Log-probabilities [T] of an answer's tokens under one role, by one plain pass."""
    prompt = assembly.prompter.encode(({"role": "user", "content": "hello"},), assembly.topology.weights)[role]
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, -len(answer) - 1 : -1]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", 1.0),
        ("-a + +b", 1.0),
        ("a - 0.5 * b", 0.0),
        ("(a - b) * 3 / -2", 1.5),
        ("2 * (1 + 1) * a", 4.0),
        ("max(a, b, 0) - min(a, b)", 1.0),
        ("max(1, a * 3) + min(a, 0.25)", 3.25),
        ("a * max(1, 2)", 2.0),
    ],
)
def test_a_formula_is_arithmetic(text, expected):
    found = Formula(text).value({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])})
    assert found.item() == expected


@pytest.mark.parametrize(
    "text",
    ["", "1", "a b", "a * b", "a / b", "a / 0", "1 / a", "a ** 2", "a // 2", "a % 2", "a.b", "a[0]", "f(a)", "max(a)",
     "max(a, key=b)", "a if b else a", "'a'", "a and b", "__import__('os')", "(a, b)", "a := 2", "lambda: a",
     "1e999 * a", "not a", "~a", "True * a", "a" * 2001, "(" * 300 + "a" + ")" * 300, "a\nb", "a / (1 - 1)"],
)  # fmt: skip
def test_what_is_no_formula_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=r"formula|names no term") as caught:
        Formula(text)
    assert len(str(caught.value).splitlines()) == 1


def test_a_formula_equals_plain_passes_and_shares_roles_with_other_kinds(tiny, tmp_path):
    base, other = tiny("llama"), tiny("llama", seed=1)
    adapter = make_lora(tmp_path / "lora", base, "q_proj", "v_proj", seed=3)
    principals = {
        "mix": {
            "kind": "formula",
            "formula": "0.5 * kind - max(tuned_lora, other / 2) + 0.25 * base",
            "terms": {
                "kind": {"principle": "be kind"},
                "tuned_lora": {"adapter": str(adapter)},
                "other": {"model": str(other)},
            },
            "weight": 0.3,
        },
        "kindly": {"kind": "prompted", "principle": "be kind", "weight": 0.2},
    }
    config = config_of(base, principals, decoding=DECODING, cluster={"slots": 3})
    assembly = assemble(config, NOWHERE)
    assert [[role.name for role in host.roles] for host in assembly.topology.hosts] == [
        ["base", "mix", "mix.tuned_lora"],
        ["mix.other"],
    ]
    rows = [ask("a", "hello"), ask("b", "what is it?"), ask("c", "more")]
    records = decode(config, rows)
    answer = [token.token_id for token in records["a"].tokens]
    import peft

    lora = peft.PeftModel.from_pretrained(load(base), adapter).eval()
    kind, own = (plain(assembly, role, load(base), answer) for role in ("mix", "base"))
    with_lora = plain(assembly, "mix.tuned_lora", lora, answer)
    others = plain(assembly, "mix.other", load(other), answer)
    expected = (0.5 * kind - torch.maximum(with_lora, others / 2) + 0.25 * own).sum().item()
    assert records["a"].rewards["mix"] == pytest.approx(expected, abs=2e-3)
    assert records["a"].rewards["kindly"] == pytest.approx((kind - own).sum().item(), abs=2e-3)
    alone = config_of(base, principals, decoding=DECODING, cluster={"slots": 1})
    assert decode(alone, rows[::-1]) == records


def test_at_unit_temperature_a_linear_formula_is_language_model_arithmetic(tiny):
    """The policy is the normalised product of powers: p_base x p_kind^0.7 / p_other^0.4."""
    base, other = tiny("llama"), tiny("llama", seed=1)
    principals = {
        "lma": {
            "kind": "formula",
            "formula": "0.7 * kind - 0.4 * other",
            "terms": {"kind": {"principle": "be kind"}, "other": {"model": str(other)}},
        }
    }
    decoding = {"max_new_tokens": 1, "trace": "tokens", "rule": "linear", "agent_temperature": 1.0, "candidates": 40}
    config = config_of(base, principals, decoding=decoding)
    assembly = assemble(config, NOWHERE)
    [token] = decode(config, [ask("a", "hello")])["a"].tokens

    @torch.no_grad()
    def next_logprobs(role, model):
        prompt = assembly.prompter.encode(({"role": "user", "content": "hello"},), {"lma": 1.0})[role]
        return model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)

    own = next_logprobs("base", load(base))
    product = own + 0.7 * next_logprobs("lma", load(base)) - 0.4 * next_logprobs("lma.other", load(other))
    top = own.topk(40).indices
    policy = product[top].log_softmax(-1)
    assert token.logprob == pytest.approx(policy[top.tolist().index(token.token_id)].item(), abs=1e-3)


def test_a_negative_principle_takes_the_place_of_the_plain_prompt(tiny):
    base = tiny("llama")
    principals = {"kind": {"kind": "prompted", "principle": "be kind", "negative_principle": "be rude"}}
    config = config_of(base, principals, decoding=DECODING)
    assembly = assemble(config, NOWHERE)
    (host,) = assembly.topology.hosts
    assert [role.name for role in host.roles] == ["base", "kind", "kind.reference"]
    record = decode(config, [ask("a", "hello")])["a"]
    answer = [token.token_id for token in record.tokens]
    model = load(base)
    expected = plain(assembly, "kind", model, answer) - plain(assembly, "kind.reference", model, answer)
    assert record.rewards["kind"] == pytest.approx(expected.sum().item(), abs=2e-3)
    prompts = assembly.prompter.encode(({"role": "user", "content": "hello"},), {"kind": 1.0})
    read = {role: assembly.prompter.decode(ids) for role, ids in prompts.items()}
    assert ["be rude" in read[role] for role in ("base", "kind", "kind.reference")] == [False, False, True]


def test_a_pair_of_adapters_shares_its_backbone(tiny, tmp_path):
    import peft

    base, small = tiny("gpt2"), tiny("llama")
    tuned, before = (make_lora(tmp_path / str(seed), small, "q_proj", seed=seed) for seed in (1, 2))
    pair = {"kind": "tuned_pair", "model": str(small), "adapter": str(tuned)}
    principals = {
        "pair": {**pair, "reference_adapter": str(before), "weight": 0.3},
        "plain": {**pair, "reference": "backbone", "weight": 0.2},
    }
    config = config_of(base, principals, decoding=DECODING)
    assembly = assemble(config, NOWHERE)
    assert [[role.name for role in host.roles] for host in assembly.topology.hosts] == [
        ["base"],
        ["pair", "pair.reference", "plain.reference"],
    ]
    record = decode(config, [ask("a", "hello")])["a"]
    answer = [token.token_id for token in record.tokens]
    first, second = (peft.PeftModel.from_pretrained(load(small), folder).eval() for folder in (tuned, before))
    own = plain(assembly, "plain.reference", load(small), answer)
    with_first = plain(assembly, "pair", first, answer)
    with_second = plain(assembly, "pair.reference", second, answer)
    assert record.rewards["pair"] == pytest.approx((with_first - with_second).sum().item(), abs=2e-3)
    assert record.rewards["plain"] == pytest.approx((with_first - own).sum().item(), abs=2e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "formula", "formula": "a - b", "terms": {"a": {}}}, "names 'b', which is none of terms"),
        ({"kind": "formula", "formula": "a", "terms": {"a": {}, "b": {}}}, "terms.b has no effect"),
        ({"kind": "formula", "formula": "base", "terms": {"base": {}}}, "a term's name"),
        ({"kind": "formula", "formula": "a ** 2", "terms": {"a": {}}}, "cannot be computed"),
        ({"kind": "formula", "formula": "a", "terms": {"a": {"placement": "user"}}}, "no effect without a principle"),
        ({"kind": "prompted", "principle": "x", "negative_principle": "x"}, "the principle itself"),
        ({"kind": "tuned_pair", "model": "m"}, "needs a reference"),
        ({"kind": "tuned_pair", "reference": "m"}, "needs a model, an adapter, or both"),
        ({"kind": "tuned_pair", "model": "m", "reference": "backbone"}, "backbone needs an adapter"),
        ({"kind": "tuned_pair", "adapter": "a", "reference_adapter": "a"}, "are the same"),
    ],
)
def test_what_would_do_nothing_is_refused_before_any_model_is_found(fields, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        config_of("nowhere", {"it": fields})
    assert len(str(caught.value).splitlines()) == 1


def test_the_plan_shows_the_formula_and_the_fingerprint_what_its_terms_are(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 3)
    term = {"kind": {"principle": "be kind"}, "other": {"model": str(tiny("llama", seed=1))}}
    principals = {"mix": {"kind": "formula", "formula": "kind - 0.1 * other", "terms": term}}
    config = job(prompts, tmp_path / "run", tiny(), principals=principals)
    prepared = prepare(config, NOWHERE)
    text = describe_plan(prepared.plan, plan_replica(config, prepared.models, NOWHERE))
    assert "kind - 0.1 * other (kind = log p[mix], other = log p[mix.other])" in text
    fingerprint = prepared.plan.fingerprint
    assert fingerprint["models.principals.mix.terms.other.model"].startswith("sha256:")
    assert fingerprint["principals.mix.formula"] == "kind - 0.1 * other"
    assert str(tiny("llama", seed=1)) not in str(fingerprint)
    # keys that came later are not in the fingerprint of a run that does without them
    older = prepare(job(prompts, tmp_path / "older", tiny()), NOWHERE).plan.fingerprint
    assert not any("negative" in key or "adapter" in key for key in older)
    run_job(config, tmp_path)
    assert len(parts(tmp_path / "run")) == 1


def test_a_formula_steers_generate_as_it_steers_a_run(tiny):
    base, other = tiny("llama"), tiny("llama", seed=1)
    formula = {"kind": "formula", "formula": "kind - 0.5 * other", "weight": 0.6}
    model, tokenizer = load(base), AutoTokenizer.from_pretrained(base)
    principals = {"mix": {**formula, "terms": {"kind": {"principle": "be kind"}, "other": {"model": load(other)}}}}
    steps = []
    processor = CageLogitsProcessor(model, tokenizer, principals, agent_temperature=0.5, on_step=steps.append)
    inputs = processor.encode(["hello"])
    found = model.generate(**inputs, logits_processor=[processor], max_new_tokens=6, do_sample=False)
    terms = {"kind": {"principle": "be kind"}, "other": {"model": str(other)}}
    decoding = {"max_new_tokens": 6, "trace": "tokens", "agent_temperature": 0.5, "temperature": 0}
    config = config_of(base, {"mix": {**formula, "terms": terms}}, decoding=decoding)
    record = decode(config, [ask("a", "hello")])["a"]
    assert found[0, inputs["input_ids"].shape[1] :].tolist() == [token.token_id for token in record.tokens]
    assert engine_of(config)[1].topology.principals[0].kind == "formula"


@pytest.mark.parametrize("text", ["-" * 1500 + "a", "a" + "+a" * 600, "max(a, " * 240 + "a" + ")" * 240])
def test_a_formula_that_is_nested_too_deeply_is_refused_and_no_crash(text):
    with pytest.raises(ValueError, match=r"more than 200 levels|is no formula"):
        Formula(text)


def test_a_long_sum_is_a_formula():
    assert Formula("a" + " + a" * 190).value({"a": torch.ones(1)}).item() == 191
