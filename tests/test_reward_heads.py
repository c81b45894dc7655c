"""Heads of every make as principals: TRL's, safe-rlhf's, ArmoRM's, layers with a bias, beside models and adapters."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from support import tiny_models
from support.decoding import NOWHERE, ask, config_of, decode, engine_of
from support.heads import PlainStates, random, with_head
from support.lora import make_lora
from support.runs import job, parts, run_job, write_prompts
from torch.nn.functional import linear, relu

from pipeline.errors import ConfigurationError
from pipeline.hub.reward_heads import ARMORM
from pipeline.runtime.assembly import assemble

DECODING = {"max_new_tokens": 6, "candidates": 5, "agent_temperature": 0.7, "trace": "tokens"}
ROWS = [ask("a", "hello"), ask("b", "what is it?"), ask("c", "tell me more")]
WIDTH = 64


def scored(tiny, fields, *, kind="reward_model", **options):
    """The record of one row that the principal steers, equal in any batch, and its total reward."""
    principals = {"it": {"kind": kind, "candidates": 5, "weight": 0.5, **fields}}
    configs = [
        config_of(tiny("llama"), principals, decoding=DECODING, cluster={"slots": slots}, **options)
        for slots in (3, 1)
    ]
    records, alone = decode(configs[0], ROWS), decode(configs[1], ROWS[::-1])
    assert alone == records
    return records["a"]


def total(record, plain, score, *, end=()):
    """score(answer) - score(nothing) by whole passes."""
    prompt, answer = plain.prompt("hello"), [token.token_id for token in record.tokens]
    after = [] if answer[-1:] == list(end) else list(end)
    return float(score(plain.last([*prompt, *answer, *after])) - score(plain.last([*prompt, *end])))


def trl(tiny, tmp_path, seed=1, **options):
    """A causal LM with TRL's value head; its folder, its plain model and its head."""
    weight, bias = random(1, WIDTH, seed=seed), random(1, seed=seed + 1)
    tensors = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    folder = with_head(tiny("llama", seed=3), tmp_path / f"trl{seed}", tensors, drop=(), **options)
    return folder, PlainStates(tiny("llama", seed=3)), lambda state: linear(state, weight, bias)[0]


@pytest.mark.parametrize("kind", ["value", "reward_model"])
def test_a_value_head_of_trl_values_every_prefix(tiny, tmp_path, kind):
    folder, plain, score = trl(tiny, tmp_path)
    record = scored(tiny, {"model": str(folder), "scale": 2.0, "sign": -1}, kind=kind)
    assert record.rewards["it"] == pytest.approx(-2 * total(record, plain, score), abs=5e-3)
    assert record.rewards["it"] != 0


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "mistral", "gemma2", "neox"])
def test_value_heads_of_other_families(tiny, tmp_path, kind):
    weight, bias = random(1, WIDTH, seed=5), random(1, seed=6)
    tensors = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    source = tiny(kind, seed=2)
    folder = with_head(source, tmp_path / kind, tensors, drop=())
    record = scored(tiny, {"model": str(folder)}, kind="value")
    expected = total(record, PlainStates(source), lambda state: linear(state, weight, bias)[0])
    assert record.rewards["it"] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("names", [("weight", "bias"), ("v_head.summary.weight", "v_head.summary.bias")])
def test_a_head_in_a_file_beside_the_model(tiny, tmp_path, names):
    weight, bias = random(1, WIDTH, seed=7), random(1, seed=8)
    source = tiny("llama", seed=3)
    folder = with_head(source, tmp_path / "model", {}, drop=())
    save_file(dict(zip(names, (weight, bias), strict=True)), folder / "value_head.safetensors")
    record = scored(tiny, {"model": str(folder)}, kind="value")
    expected = total(record, PlainStates(source), lambda state: linear(state, weight, bias)[0])
    assert record.rewards["it"] == pytest.approx(expected, abs=5e-3)


def test_heads_beside_adapters_share_their_backbone(tiny, tmp_path):
    source = tiny("llama", seed=3)
    folders = [make_lora(tmp_path / str(seed), source, "q_proj", "down_proj", seed=seed) for seed in (1, 2)]
    weights = [random(1, WIDTH, seed=seed) for seed in (11, 12)]
    for folder, weight in zip(folders, weights, strict=True):
        save_file({"weight": weight, "bias": torch.ones(1)}, folder / "value_head.safetensors")
    value = {"kind": "value", "model": str(source), "candidates": 5, "weight": 0.4}
    principals = {name: {**value, "adapter": str(folder)} for name, folder in zip("xy", folders, strict=True)}
    config = config_of(tiny("llama"), principals, decoding=DECODING, cluster={"slots": 3})
    assembly = assemble(config, NOWHERE)
    assert [[role.name for role in host.roles] for host in assembly.topology.hosts] == [["base"], ["x", "y"]]
    records = decode(config, ROWS)
    for name, folder, weight in zip("xy", folders, weights, strict=True):
        plain = PlainStates(source, folder)
        expected = total(records["a"], plain, lambda state, weight=weight: (weight @ state)[0])
        assert records["a"].rewards[name] == pytest.approx(expected, abs=5e-3)
    alone = config_of(tiny("llama"), principals, decoding=DECODING, cluster={"slots": 1})
    assert decode(alone, ROWS[::-1]) == records


def test_an_output_of_a_head_beside_an_adapter_is_chosen_as_one_beside_a_model_is(tiny, tmp_path):
    source, weight = tiny("llama", seed=3), random(3, WIDTH, seed=13)
    folder = make_lora(tmp_path / "adapter", source, "q_proj", seed=1)
    save_file({"weight": weight, "bias": torch.ones(3)}, folder / "value_head.safetensors")
    fields = {"model": str(source), "adapter": str(folder), "label": 2}
    record = scored(tiny, fields, kind="value")
    plain = PlainStates(source, folder)
    assert record.rewards["it"] == pytest.approx(total(record, plain, lambda state: (weight @ state)[2]), abs=5e-3)


@pytest.mark.parametrize(
    ("score_type", "pooling", "fields"),
    [
        ("reward", "auto", {"do_normalize": True, "mean": 0.5, "var": 4.0}),
        ("cost", "end_of_text", {"do_normalize": True}),
        ("reward", "last_token", {}),
    ],
)
def test_heads_of_safe_rlhf_are_scored_where_a_text_ends(tiny, tmp_path, score_type, pooling, fields):
    source, weight, bias = tiny("llama", seed=4), random(1, WIDTH, seed=9), random(1, seed=10)
    tensors = {"score_head.weight": weight, "score_head.bias": bias}
    if "mean" not in fields:
        tensors |= {"normalizer.mean": torch.tensor([0.5]), "normalizer.var": torch.tensor([4.0])}
        tensors["normalizer.count"] = torch.tensor([3])
    folder = with_head(
        source, tmp_path / "score", tensors, architectures=["LlamaModelForScore"], score_type=score_type, **fields
    )
    record = scored(tiny, {"model": str(folder), "pooling": pooling})
    scale = 0.5 if fields else 1.0  # the standard deviation is 2, and a mean cancels
    end = () if pooling == "last_token" else (0,)
    expected = scale * total(record, PlainStates(source), lambda state: (weight @ state)[0], end=end)
    assert record.rewards["it"] == pytest.approx(expected, abs=5e-3)


def test_an_existing_answer_is_scored_at_its_end_as_a_decoded_one_is(tiny, tmp_path):
    source, weight = tiny("llama", seed=4), random(1, WIDTH, seed=9)
    folder = with_head(
        source, tmp_path / "score", {"score_head.weight": weight}, architectures=["LlamaModelForScore"]
    )
    principals = {"it": {"kind": "reward_model", "model": str(folder), "candidates": 5}}
    record = decode(config_of(tiny("llama"), principals, decoding=DECODING), [ask("a", "hello", response="good")])[
        "a"
    ]
    plain = PlainStates(source)
    answer = [*plain.tokenizer("good", add_special_tokens=False)["input_ids"], 0]
    prompt = plain.prompt("hello")
    expected = float((weight @ (plain.last([*prompt, *answer]) - plain.last([*prompt, 0])))[0])
    assert record.original_rewards["it"] == pytest.approx(expected, abs=5e-3)


def test_each_output_of_a_regression_layer_by_name(tiny, tmp_path):
    source, weight = tiny("llama", seed=5), random(19, WIDTH, seed=13)
    tensors = {
        "regression_layer.weight": weight,
        "gating.layers.0.weight": random(8, WIDTH, seed=1),
        "reward_transform_matrix": torch.eye(19),
    }
    folder = with_head(source, tmp_path / "armo", tensors, architectures=["LlamaForRewardModelWithGating"])
    model = str(folder)
    label = "ultrafeedback-honesty"
    record = scored(tiny, {"model": model, "label": label})
    row = weight[ARMORM.index(label)]
    assert record.rewards["it"] == pytest.approx(
        total(record, PlainStates(source), lambda state: row @ state), abs=5e-3
    )
    assert scored(tiny, {"model": model, "label": ARMORM.index(label)}) == record
    message = refused(tiny, {"model": model})
    assert "label is missing: the model has 19 outputs, 0 (helpsteer-helpfulness), 1" in message
    assert "label must be one of 0 (helpsteer-helpfulness)" in refused(tiny, {"model": model, "label": "honesty"})
    assert "got 19" in refused(tiny, {"model": model, "label": 19})


def test_outputs_of_a_sequence_classifier_are_chosen_by_name_too(tiny, tmp_path):
    folder = tiny_models.make_reward_model(tmp_path, num_labels=3)
    path = folder / "config.json"
    names = {"0": "helpful", "1": "harmless", "2": "honest"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": names}))
    by_name = scored(tiny, {"model": str(folder), "label": "harmless"})
    assert by_name == scored(tiny, {"model": str(folder), "label": 1})
    assert by_name != scored(tiny, {"model": str(folder), "label": 2})
    assert "label must be one of 0 (helpful), 1 (harmless), 2 (honest); got 'kind'" in refused(
        tiny, {"model": str(folder), "label": "kind"}
    )


def test_a_head_with_a_bias_and_one_of_several_layers(tiny, tmp_path):
    source = tiny("qwen2", seed=5)
    weight, bias = random(2, WIDTH, seed=1), random(2, seed=2)
    tensors = {"score.weight": weight, "score.bias": bias}
    folder = with_head(source, tmp_path / "bias", tensors, architectures=["Qwen2ForSequenceClassification"])
    record = scored(tiny, {"model": str(folder), "label": 1})
    plain = PlainStates(source)
    assert record.rewards["it"] == pytest.approx(total(record, plain, lambda state: weight[1] @ state), abs=5e-3)
    deep = {
        "score.0.weight": random(WIDTH, WIDTH, seed=1), "score.0.bias": random(WIDTH, seed=2),
        "score.2.weight": random(1, WIDTH, seed=3), "score.2.bias": random(1, seed=4),
    }  # fmt: skip
    first, first_bias, last, last_bias = deep.values()
    folder = with_head(source, tmp_path / "deep", deep, architectures=["Qwen2ForRewardModel"])
    record = scored(tiny, {"model": str(folder)})

    def score(state):
        return linear(relu(linear(state, first, first_bias)), last, last_bias)[0]

    assert record.rewards["it"] == pytest.approx(total(record, plain, score), abs=5e-3)
    unknown = with_head(source, tmp_path / "unknown", deep, architectures=["SomeOtherModel"])
    assert "its configuration does not say what is between them" in refused(tiny, {"model": str(unknown)})


def refused(tiny, fields, kind="reward_model"):
    """The message that refuses a principal before any weights are loaded."""
    principals = {"it": {"kind": kind, **fields}}
    with pytest.raises(ConfigurationError) as caught:
        assemble(config_of(tiny("llama"), principals), NOWHERE)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_heads_that_do_not_fit_are_refused_by_name_before_any_weights_are_loaded(tiny, tmp_path):
    source = tiny("llama", seed=3)

    def made(name, tensors, **config):
        return {"model": str(with_head(source, tmp_path / name, tensors, drop=(), **config))}

    wide = made("wide", {"v_head.summary.weight": torch.zeros(1, 128), "v_head.summary.bias": torch.zeros(1)})
    assert "v_head.summary.weight [1, 128] does not fit: it must have 64 columns" in refused(tiny, wide, "value")
    bias = made("bias", {"score_head.weight": torch.zeros(1, 64), "score_head.bias": torch.zeros(2)})
    assert "score_head.bias [2] does not fit: it must be [1]" in refused(tiny, bias)
    vector = made("vector", {"v_head.summary.weight": torch.zeros(64)})
    assert "v_head.summary.weight [64] does not fit" in refused(tiny, vector, "value")
    two = made("two", {"v_head.summary.weight": torch.zeros(1, 64), "score.weight": torch.zeros(1, 64)})
    assert "has several heads, score, v_head.summary" in refused(tiny, two)
    token = made("token", {"v_head.weight": torch.zeros(1, 64)}, reward_token_id=9)
    assert "at a token of its own behind the text (reward_token_id: 9)" in refused(tiny, token)
    steps = made("steps", {"score.weight": torch.zeros(2, 64)}, architectures=["Qwen2ForProcessRewardModel"])
    assert "is a process reward model: it scores steps at marks" in refused(tiny, {**steps, "label": 1})
    none = made("none", {})
    assert "hold no head that gives scores" in refused(tiny, none, "value")
    beside = made("beside", {})
    save_file({"weight": torch.zeros(1, 32)}, tmp_path / "beside" / "value_head.safetensors")
    assert re.search(
        r"value_head.safetensors: the head weight \[1, 32\] does not fit", refused(tiny, beside, "value")
    )
    save_file({"other": torch.zeros(1)}, tmp_path / "beside" / "value_head.safetensors")
    assert "must hold one linear layer, weight [1, 64] and bias [1]; it holds other [1]" in refused(
        tiny, beside, "value"
    )
    adapter = make_lora(tmp_path / "adapter", source, "q_proj")
    fields = {"model": str(source), "adapter": str(adapter)}
    assert "has no value_head.safetensors in its folder" in refused(tiny, fields, "value")
    with pytest.raises(ConfigurationError, match="kind value needs a model with a value head, or an adapter"):
        config_of("nowhere", {"it": {"kind": "value"}})


def test_a_backbone_that_lacks_weights_or_a_normalizer_its_numbers_is_refused(tiny, tmp_path):
    source = tiny("llama", seed=3)
    head = {"score_head.weight": torch.zeros(1, 64)}

    def message(folder):
        with pytest.raises(ConfigurationError) as caught:
            engine_of(config_of(tiny("llama"), {"it": {"kind": "reward_model", "model": str(folder)}}))
        return str(caught.value)

    lacking = with_head(source, tmp_path / "lacking", head, drop=("lm_head.weight", "model.norm.weight"))
    assert re.search(r"its files lack 1 weight \(.*norm\.weight\), which would be random", message(lacking))
    other = with_head(source, tmp_path / "other", {**head, "extra.weight": torch.zeros(2)})
    assert re.search(r"its files hold 1 weight \(extra\.weight\), which the model has no place for", message(other))
    unnormal = with_head(source, tmp_path / "unnormal", head, do_normalize=True)
    assert "says do_normalize and has no mean or var" in message(unnormal)
    for at, (mean, var) in enumerate((([1.0, 2.0], [1.0, 1.0]), ([0.0], [-1.0]), ([0.0], [0.0]))):
        odd = with_head(source, tmp_path / f"odd{at}", head, do_normalize=True, mean=mean, var=var)
        assert "its normalizer needs a mean and a var > 0 of 1 or 1 numbers" in message(odd)


def test_a_run_with_a_value_head_reads_a_models_own_tokens_and_resumes_with_the_same_bytes(tiny, tmp_path):
    source = tiny_models.make_model(tmp_path / "pairs", seed=2, tokenizer=tiny_models.make_pair_tokenizer())
    tensors = {"v_head.summary.weight": random(1, WIDTH, seed=1), "v_head.summary.bias": torch.zeros(1)}
    folder = with_head(source, tmp_path / "valued", tensors, drop=())
    principals = {
        "worth": {"kind": "value", "model": str(folder), "candidates": 4, "interval": 2},
        "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.3},
    }
    prompts = write_prompts(tmp_path / "prompts.jsonl", 5)
    run_job(job(prompts, tmp_path / "one", tiny(), principals=principals), tmp_path)
    run_job(job(prompts, tmp_path / "two", tiny(), principals=principals, cluster={"slots": 2}), tmp_path)
    assert parts(tmp_path / "one") == parts(tmp_path / "two")
