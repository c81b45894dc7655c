"""A checkpoint is read whole, or the run does not begin: its weights, their names and their shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import cage
from support.language_models import spec_of
from support.lora import make_lora
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigurationError
from pipeline.hub.sources import resolve_model
from pipeline.protocol.specs import HostSpec, RewardSpec
from pipeline.protocol.topology import HostRole
from pipeline.worker.loading import load_language_model
from pipeline.worker.reward_loading import load_reward_model
from pipeline.worker.weights import load_causal_lm

Weights = dict[str, Tensor]
TOKENS = torch.arange(5, 40)[None]


def changed(folder: Path, target: Path, change: Callable[[Weights], Weights], **settings: Any) -> Path:
    """A copy of a model with other weights, and other settings in its config.json."""
    shutil.copytree(folder, target)
    save_file(
        change(load_file(target / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **settings}))
    return target


def renamed(change: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda weights: {change(name): weight for name, weight in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def split(folder: Path, target: Path) -> Path:
    """A copy of a model in several files and an index."""
    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size="100KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def loaded(folder: Path) -> Any:
    return load_causal_lm(spec_of(folder), dtype=torch.float32)


def reward_spec(folder: Path) -> HostSpec:
    return HostSpec(
        name="kind", serves=("kind",), source=resolve_model(str(folder), cache_folder=folder), dtype="auto",
        device="cpu", roles=(HostRole("kind"),), num_slots=1, vocab_size=261, strict=True, cache_folder=folder,
        reward=RewardSpec((0,)),
    )  # fmt: skip


FAULTS = {
    "no head": (without("lm_head"), {}, r"its files lack 1 weight \(lm_head.weight\), which would be random"),
    "no MLP in a layer": (
        without("layers.1.mlp"), {},
        r"its files lack 3 weights \(model.layers.1.mlp.down_proj.weight, .*up_proj.weight\), which would be random",
    ),
    "fewer layers": (without("layers.1."), {}, r"its files lack 9 weights \(model.layers.1.*and 4 more\)"),
    "more layers": (
        dict, {"num_hidden_layers": 1},
        r"its files hold 9 weights \(model.layers.1.*and 4 more\), which the model has no place for",
    ),
    "one more": (
        lambda weights: {**weights, "v_head.summary.weight": torch.zeros(1, 64)}, {},
        r"its files hold 1 weight \(v_head.summary.weight\), which the model has no place for",
    ),
    "another shape": (
        lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"][:-1].contiguous()}, {},
        r"another shape than its configuration says: 1 weight \(lm_head.weight \[260, 64\], not \[261, 64\]\)",
    ),
    "another vocabulary": (
        dict, {"vocab_size": 300}, r"2 weights \(lm_head.weight \[261, 64\], not \[300, 64\], model.embed_tokens"
    ),
    "another prefix": (
        renamed(lambda name: f"base_model.model.{name}"), {}, r"its files lack 21 weights.*its files hold 21 weights"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_checkpoint_that_is_not_the_model_is_refused_with_names_and_counts(tiny, tmp_path, fault):
    change, settings, message = FAULTS[fault]
    folder = changed(tiny(), tmp_path / "model", change, **settings)
    with pytest.raises(ConfigurationError, match=rf"^model {folder} \(for base\): .*{message}"):
        load_language_model(spec_of(folder))


def inside(mark: str) -> Callable[[str], str]:
    """In the names of the first layer."""
    return lambda name: name.replace(".0.", f".0.{mark}", 1)


WRAPPED: dict[str, tuple[Callable[[str], str], str]] = {
    "compiled": (lambda name: f"_orig_mod.{name}", r"torch\.compile"),
    "parallel": (lambda name: f"module.{name}", "DistributedDataParallel"),
    "compiled of parallel": (lambda name: f"_orig_mod.module.{name}", r"torch\.compile and DistributedDataParallel"),
    "parallel of compiled": (lambda name: f"module._orig_mod.{name}", r"DistributedDataParallel and torch\.compile"),
    "sharded": (lambda name: "_fsdp_wrapped_module." + inside("_fsdp_wrapped_module.")(name), "FSDP"),
    "one layer compiled": (inside("_orig_mod."), r"torch\.compile"),
    "one layer checkpointed": (inside("_checkpoint_wrapped_module."), "activation checkpointing"),
}


@pytest.mark.parametrize("wrapper", list(WRAPPED))
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_names_that_wrappers_left_are_understood_and_said(tiny, tmp_path, kind, wrapper):
    spell, who = WRAPPED[wrapper]
    folder = changed(tiny(kind), tmp_path / "model", renamed(spell))
    with pytest.warns(RuntimeWarning, match=f"wrapped by {who}; what that added to their names is left out"):
        model = loaded(folder)
    assert torch.equal(logits(model), logits(loaded(tiny(kind))))


def test_a_mark_of_a_wrapper_in_some_names_is_understood_while_names_stay_apart(tiny, tmp_path):
    folder = changed(tiny(), tmp_path / "part", renamed(lambda name: name.replace("model.", "_orig_mod.model.", 1)))
    with pytest.warns(RuntimeWarning, match=r"torch\.compile"):
        assert torch.equal(logits(loaded(folder)), logits(loaded(tiny())))
    both = changed(tiny(), tmp_path / "both", lambda weights: {**weights, "_orig_mod.lm_head.weight": torch.zeros(1)})
    with pytest.raises(ConfigurationError, match=r"hold 1 weight \(lm_head.weight\) twice.*torch.compile leaves"):
        loaded(both)
    one = changed(tiny(), tmp_path / "one", renamed(lambda name: name.replace("lm_head", "module.lm_head")))
    with pytest.raises(ConfigurationError, match=r"lack 1 weight \(lm_head.weight\).*hold 1 weight \(module.lm_head"):
        loaded(one)


def test_weights_in_several_files_are_read_whole_whatever_other_files_are_there(tiny, tmp_path):
    folder = split(tiny(), tmp_path / "split")
    assert torch.equal(logits(loaded(folder)), logits(loaded(tiny())))
    shutil.copy(tiny() / "model.safetensors", folder / "consolidated.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in folder.glob("model-*.safetensors"):
        weights = {f"module.{name}": weight for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    index["weight_map"] = {f"module.{name}": file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.warns(RuntimeWarning, match="wrapped by DistributedDataParallel"):
        assert torch.equal(logits(loaded(folder)), logits(loaded(tiny())))
    file = index["weight_map"]["module.lm_head.weight"]
    save_file(without("lm_head")(load_file(folder / file)), folder / file, metadata={"format": "pt"})
    with pytest.warns(RuntimeWarning), pytest.raises(ConfigurationError, match=r"lack 1 weight \(lm_head.weight\)"):
        loaded(folder)


@pytest.mark.parametrize("has_head", [True, False])
def test_a_tied_model_needs_no_head_in_its_file(tiny, tmp_path, has_head):
    def tie(weights: Weights) -> Weights:
        head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()} if has_head else {}
        return {**without("lm_head")(weights), **head}

    model = loaded(changed(tiny(), tmp_path / "model", tie, tie_word_embeddings=True))
    assert torch.equal(model.get_output_embeddings().weight, loaded(tiny()).get_input_embeddings().weight)


def test_a_bfloat16_file_is_read_as_float32_on_a_cpu(tiny, tmp_path):
    def halve(weights: Weights) -> Weights:
        return {name: weight.bfloat16() for name, weight in weights.items()}

    folder = changed(tiny(), tmp_path / "half", halve, dtype="bfloat16")
    same = changed(tiny(), tmp_path / "same", lambda weights: {k: w.float() for k, w in halve(weights).items()})
    found = load_language_model(spec_of(folder))
    assert found.slot_runner is not None
    model = loaded(folder)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(same)))


REWARD_FAULTS = {
    "no head": (without("score"), {}, r"its files lack 1 weight \(score.weight\), which would be random"),
    "no MLP in a layer": (without("layers.1.mlp"), {}, r"its files lack 3 weights \(model.layers.1.mlp.down_proj"),
    "one more": (lambda weights: {**weights, "bias": torch.zeros(1)}, {}, r"hold 1 weight \(bias\), which the model"),
    "another head": (
        renamed(lambda name: name.replace("score.", "thing.")), {},
        r"lack 1 weight \(score.weight\).*hold 1 weight \(thing.weight\)",
    ),
    "another shape": (
        lambda weights: {**weights, "score.weight": torch.zeros(3, 64)}, {},
        r"another shape than its configuration says: 1 weight \(score.weight \[3, 64\], not \[1, 64\]\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(REWARD_FAULTS))
def test_a_reward_model_that_is_not_whole_is_refused_with_names_and_counts(judge, tmp_path, fault):
    change, settings, message = REWARD_FAULTS[fault]
    folder = changed(judge(), tmp_path / "model", change, **settings)
    with pytest.raises(ConfigurationError, match=rf"^reward model {folder} \(for kind\).*{message}"):
        load_reward_model(reward_spec(folder), RewardSpec((0,)))


def test_a_language_model_is_no_reward_model_and_the_reverse(tiny, judge):
    with pytest.raises(
        ConfigurationError, match=r"hold no head that gives scores, and a LlamaForCausalLM is no sequence"
    ):
        load_reward_model(reward_spec(tiny()), RewardSpec((0,)))
    with pytest.raises(ConfigurationError, match=r"lack 1 weight \(lm_head.weight\).*hold 1 weight \(score.weight\)"):
        load_language_model(spec_of(judge()))


def test_a_reward_model_that_was_wrapped_scores_as_it_did(judge, tmp_path):
    folder = changed(judge(), tmp_path / "model", renamed(lambda name: f"module.{name}"))
    reward = RewardSpec((0,))
    with pytest.warns(RuntimeWarning, match="wrapped by DistributedDataParallel"):
        runner = load_reward_model(reward_spec(folder), reward)
    prompts, answer = {"kind": [3, 9, 4]}, [5, 6, 7]
    assert torch.equal(
        runner.score(prompts, answer), load_reward_model(reward_spec(judge()), reward).score(prompts, answer)
    )


def test_a_model_with_an_adapter_among_its_files_is_refused_with_what_to_do(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny(), tmp_path / "model"))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(
        ConfigurationError, match=r"holds a model and a LoRA adapter.*name that under adapter; delete"
    ):
        resolve_model(str(folder), cache_folder=tmp_path)


def test_a_run_ends_with_exit_code_2_and_one_line_before_anything_is_answered(tiny, tmp_path):
    folder = changed(tiny(), tmp_path / "model", without("lm_head"))
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    job = {
        "input": {"path": str(tmp_path / "in.jsonl")},
        "output": {"path": str(tmp_path / "out")},
        "base": {"model": str(folder)},
        "principals": {},
        "cluster": {"transport": "local"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    done = cage("relabel", "-c", str(tmp_path / "job.yaml"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"cage: model {folder} (for base): its files lack 1 weight (lm_head.weight), which would be random"
    )
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_model_whose_own_pass_fails_or_gives_nan_ends_in_one_line(tiny, tmp_path):
    folder = changed(tiny("gpt2"), tmp_path / "short", lambda weights: weights, n_positions=16)
    shrunk = changed(folder, tmp_path / "cut", lambda weights: weights | {
        "transformer.wpe.weight": weights["transformer.wpe.weight"][:16].clone()
    })  # fmt: skip
    with pytest.raises(
        ConfigurationError, match="cannot be decoded: its own forward pass over text fails: IndexError"
    ):
        load_language_model(spec_of(shrunk))

    def enlarge(weights):
        return {name: each * (3e37 if name == "lm_head.weight" else 1.0) for name, each in weights.items()}

    huge = changed(tiny(), tmp_path / "huge", enlarge)
    with pytest.raises(ConfigurationError, match="its own forward pass over text gives NaN in float32"):
        load_language_model(spec_of(huge))


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_reward_models_and_adapters_with_numbers_that_are_not_finite_are_refused(tiny, judge, tmp_path, number):
    def spoil(weights):
        name = min(name for name in weights if "mlp.up_proj" in name or "lora_B" in name)
        weights[name] = weights[name].clone().index_fill_(0, torch.tensor([1]), number)
        return weights

    folder = changed(judge(), tmp_path / "judge", spoil)
    with pytest.raises(ConfigurationError, match=r"1 weight \(\S*up_proj\.weight\) with numbers that are NaN or inf"):
        load_reward_model(reward_spec(folder), RewardSpec((0,)))
    adapter = make_lora(tmp_path / "adapter", tiny(), "q_proj")
    file = adapter / "adapter_model.safetensors"
    save_file(spoil(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"adapter \S+: .*lora_B\S*\) with numbers that are NaN or infinite"):
        load_language_model(spec_of(tiny(), adapters={"own": adapter}))
