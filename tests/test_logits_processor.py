"""`model.generate` with principals against the pipeline's own answers."""

from __future__ import annotations

import pytest
import torch
from support.decoding import ask, config_of, decode
from support.families import make_family
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

from jobs.families.configurations import model_class
from pipeline.errors import CageError, ConfigurationError
from pipeline.logits_processor import CageLogitsProcessor

TEXTS = ["why?", "tell me a long story about the sea, please", "hi", "what is the capital of the moon?"]
DECODING = {"agent_temperature": 0.4, "candidates": 30, "min_p": 0.001}
PROMPTED = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief, and never say more than you must", "weight": 0.4},
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def pair_of(before, after):
    return {**PROMPTED, "pair": {"kind": "tuned_pair", "model": after, "reference": before, "weight": 0.3}}


def processor_of(model, folder, principals=PROMPTED, **options):
    return CageLogitsProcessor(model, AutoTokenizer.from_pretrained(folder), principals, **{**DECODING, **options})


def generate(model, processor, inputs, **options):
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "top_k": 0, **options}
    return model.generate(**inputs, logits_processor=LogitsProcessorList([processor]), **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("rule", ["equilibrium", "linear"])
def test_greedy_generate_says_what_the_pipeline_says_and_pays_what_it_pays(tiny, kind, rule):
    base, before, after = (tiny(kind, seed=seed) for seed in (3, 4, 5))
    decoding = {**DECODING, "rule": rule, "temperature": 0, "max_new_tokens": 12, "trace": "tokens"}
    rows = [ask(str(at), text) for at, text in enumerate(TEXTS)]
    records = decode(config_of(base, pair_of(str(before), str(after)), decoding=decoding), rows)

    steps = []
    model = load(base)
    processor = processor_of(model, base, pair_of(load(before), load(after)), rule=rule, on_step=steps.append)
    inputs = processor.encode(TEXTS)
    answers = generate(model, processor, inputs)[:, inputs["input_ids"].shape[1] :]

    for at, row in enumerate(rows):
        tokens = records[row.row_id].tokens
        assert answers[at, : len(tokens)].tolist() == [token.token_id for token in tokens]
        for step, token in zip(steps, tokens, strict=False):
            (drawn,) = (step.ids_BK[at] == token.token_id).nonzero()[0].tolist()
            assert float(step.log_policy_BK[at, drawn]) == pytest.approx(token.logprob, abs=1e-3)
            if rule == "equilibrium":
                paid = dict(zip(token.payments, step.payments_BJK[at, :, drawn].tolist(), strict=True))
                assert paid == pytest.approx(token.payments, abs=1e-3)
            else:
                assert step.payments_BJK is None
    paid = [paid for record in records.values() for token in record.tokens for paid in token.payments.values()]
    assert sum(paid) > 0.1 if rule == "equilibrium" else set(paid) == {None}


@pytest.mark.parametrize("rule", ["equilibrium", "linear"])
def test_answers_have_the_rewards_payments_and_kl_of_the_pipeline(tiny, rule):
    base, before, after = (tiny(seed=seed) for seed in (3, 4, 5))
    decoding = {**DECODING, "rule": rule, "temperature": 0, "max_new_tokens": 12}
    records = decode(config_of(base, pair_of(str(before), str(after)), decoding=decoding), [ask(t, t) for t in TEXTS])
    model = load(base)
    processor = processor_of(model, base, pair_of(load(before), load(after)), rule=rule)
    for again in range(2):  # every call begins anew
        returned = generate(model, processor, processor.encode(TEXTS), return_dict_in_generate=bool(again))
        answers = processor.answers(returned)
    for text, answer in zip(TEXTS, answers, strict=True):
        record = records[text]
        assert answer.num_tokens == record.num_tokens
        assert answer.rewards == pytest.approx(record.rewards, abs=2e-3)
        assert answer.payments == (
            pytest.approx(record.payments, abs=2e-3) if rule == "equilibrium" else dict.fromkeys(record.payments)
        )
        assert answer.kl_per_token == pytest.approx(record.kl_per_token, abs=1e-3)
    assert len({answer.num_tokens for answer in answers}) > 1 or all(answer.num_tokens == 12 for answer in answers)


def test_rows_that_end_early_are_counted_to_their_end(tiny):
    base = tiny(seed=3)
    model = load(base)
    processor = processor_of(model, base, candidates="all")
    steps = []
    processor._on_step = steps.append
    torch.manual_seed(0)
    inputs = processor.encode(["hi"])
    ids = generate(
        model, processor, inputs, do_sample=True, temperature=30.0, num_return_sequences=40, max_new_tokens=30
    )
    answers = processor.answers(ids)
    drawn = ids[:, inputs["input_ids"].shape[1] :].tolist()
    lengths = [row.index(0) + 1 if 0 in row else len(row) for row in drawn]
    assert [answer.num_tokens for answer in answers] == lengths
    assert len(set(lengths)) > 2
    for at, answer in enumerate(answers):
        expected = sum(float(steps[step].rewards_BJK[at, 0, drawn[at][step]]) for step in range(lengths[at]))
        assert answer.rewards["kind"] == pytest.approx(expected, abs=1e-4)


def test_answers_takes_nothing_but_what_generate_returned(tiny):
    model = load(tiny(seed=3))
    processor = processor_of(model, tiny(seed=3))
    with pytest.raises(ConfigurationError, match="answers takes what the last generate call"):
        processor.answers(torch.zeros(1, 3, dtype=torch.long))
    ids = generate(model, processor, processor.encode(TEXTS))
    for other in (ids[:2], ids[:, :-1], ids + 1, "text"):
        with pytest.raises(ConfigurationError, match="answers takes what the last generate call"):
            processor.answers(other)
    first = processor.answers(ids)
    assert processor.answers(ids) == first


def test_roles_that_share_weights_take_one_pass_a_step_and_the_base_none(tiny):
    base = tiny("llama", seed=3)
    model, after = load(base), load(tiny("llama", seed=5))
    counts = {}
    for name, each in (("base", model), ("after", after)):
        each.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    principals = {**PROMPTED, "pair": {"kind": "tuned_pair", "model": after, "reference": model}}
    processor = processor_of(model, base, principals)
    num_steps = generate(model, processor, (inputs := processor.encode(TEXTS)), max_new_tokens=5, min_new_tokens=5)
    assert num_steps.shape[1] - inputs["input_ids"].shape[1] == 5
    assert counts == {"base": 5 + 5, "after": 5}


def test_a_new_prompt_begins_anew_and_several_samples_share_one(tiny):
    base = tiny("llama", seed=3)
    model = load(base)
    processor = processor_of(model, base)
    inputs = processor.encode(TEXTS)
    expected = generate(model, processor, inputs)
    other = processor.encode(["something else"])
    generate(model, processor, other)
    inputs = processor.encode(TEXTS)
    for _ in range(2):
        again = generate(model, processor, inputs, num_return_sequences=2, do_sample=True, temperature=1e-6)
        assert torch.equal(again[::2], expected)
        assert torch.equal(again[1::2], expected)


def test_samples_are_drawn_from_the_policy_over_the_candidates(tiny):
    base = tiny("llama", seed=3)
    model, steps = load(base), []
    processor = processor_of(model, base, on_step=steps.append, candidates=5, agent_temperature=2.0)
    torch.manual_seed(0)
    drawn = generate(
        model, processor, processor.encode(TEXTS[:1]), do_sample=True, num_return_sequences=800, max_new_tokens=1
    )[:, -1]
    (step,) = steps
    for token_id, expected in zip(step.ids_BK[0].tolist(), step.log_policy_BK[0].exp().tolist(), strict=True):
        assert float((drawn == token_id).float().mean()) == pytest.approx(expected, abs=0.05)
    assert set(drawn.tolist()) <= set(step.ids_BK[0].tolist())


def test_what_generate_forbids_stays_forbidden(tiny):
    base = tiny("llama", seed=3)
    model = load(base)
    processor = processor_of(model, base)
    inputs = processor.encode(TEXTS)
    first = generate(model, processor, inputs)[:, inputs["input_ids"].shape[1]].tolist()
    again = generate(model, processor, inputs, suppress_tokens=first)[:, inputs["input_ids"].shape[1]].tolist()
    assert not set(first) & set(again)


def test_models_may_be_given_by_name_as_in_a_configuration(tiny):
    before, after = tiny("llama", seed=3), tiny("llama", seed=4)
    model = load(before)
    given = processor_of(model, before, pair_of(model, load(after)))
    named = CageLogitsProcessor(str(before), None, pair_of(str(before), str(after)), **DECODING)
    expected = generate(model, given, given.encode(TEXTS))
    assert torch.equal(generate(named.model, named, named.encode(TEXTS)), expected)
    assert named.tokenizer.get_vocab() == given.tokenizer.get_vocab()


@pytest.mark.slow
def test_the_embedded_model_is_a_name_too(cache_folder):
    processor = CageLogitsProcessor("smollm2-135m", None, {"kind": PROMPTED["kind"]}, agent_temperature=0.3)
    inputs = processor.encode(["Why does ice float on water?"])
    ids = generate(processor.model, processor, inputs, max_new_tokens=4)
    decoding = {"agent_temperature": 0.3, "temperature": 0, "max_new_tokens": 4, "trace": "tokens", "min_p": 0}
    config = config_of("smollm2-135m", {"kind": PROMPTED["kind"]}, decoding=decoding)
    record = decode(config, [ask("a", "Why does ice float on water?")], cache_folder)["a"]
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == [token.token_id for token in record.tokens]


def test_what_cannot_be_steered_is_refused(tiny):
    base = tiny("llama", seed=3)
    model = load(base)
    processor = processor_of(model, base)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ConfigurationError, match="encode"):
        generate(model, processor, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    inputs = processor.encode(TEXTS)
    with pytest.raises(ConfigurationError, match="beam search"):
        generate(model, processor, inputs, num_beams=4)
    with pytest.raises(ConfigurationError, match="other prompts"):
        generate(model, processor, {**inputs, "input_ids": inputs["input_ids"].flip(0)})
    with pytest.raises(ConfigurationError, match=r"principals.pair.model must be a loaded model or a .*; got 7"):
        processor_of(model, base, {"pair": {"kind": "tuned_pair", "model": 7, "reference": model}})
    with pytest.raises(ConfigurationError, match=r"principals.pair.model: .*/nowhere"):
        processor_of(model, base, {"pair": {"kind": "tuned_pair", "model": "/nowhere", "reference": model}})
    with pytest.raises(ConfigurationError, match="give the tokenizer of a model that is loaded"):
        CageLogitsProcessor(model, None, PROMPTED)
    with pytest.raises(ConfigurationError, match=r"(?s)agent_temperature must be greater than 0"):
        processor_of(model, base, agent_temperature=0)
    with pytest.raises(ConfigurationError, match="adapter"):
        processor_of(model, base, {"arm": {"kind": "arm", "adapter": "folder"}})
    small = tiny("gpt2", seed=3, context=80)
    short = load(small)
    processor = processor_of(short, small)
    with pytest.raises(CageError, match=r"context holds \d+ tokens"):
        generate(short, processor, processor.encode(["why?"]), max_new_tokens=40, min_new_tokens=40)


@pytest.mark.parametrize(
    "family", ["bloom", "mpt", "gptj", "falcon-new", "mamba", "mamba2", "falcon_mamba", "qwen3_next", "qwen3_5_text",
               "lfm2", "granitemoehybrid", "falcon_h1", "jamba", "nemotron_h", "recurrent_gemma", "deepseek_v32",
               "llama4_text", "phi3-longrope", "doge"]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_family_that_slots_do_not_decode_is_steered_as_the_pipeline_steers_it(tmp_path, family):
    folder = make_family(tmp_path, family)
    decoding = {**DECODING, "rule": "linear", "min_p": 0, "temperature": 0, "max_new_tokens": 8, "trace": "tokens"}
    record = decode(
        config_of({"model": str(folder), "attention": "plain"}, PROMPTED, decoding=decoding), [ask("0", TEXTS[1])]
    )["0"]
    model, steps = model_class(family).from_pretrained(folder).eval(), []
    processor = processor_of(model, folder, rule="linear", min_p=0, on_step=steps.append)
    inputs = processor.encode(TEXTS[1:2])
    answer = generate(model, processor, inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer[: len(record.tokens)] == [token.token_id for token in record.tokens]
    assert any(float((step.log_policy_BK - step.base_logprobs_BK).abs().max()) > 1e-3 for step in steps)
    for step, token in zip(steps, record.tokens, strict=False):
        (drawn,) = (step.ids_BK[0] == token.token_id).nonzero()[0].tolist()
        assert float(step.log_policy_BK[0, drawn]) == pytest.approx(token.logprob, abs=1e-3)
