"""Packages that a model's config.json asks for: known before its weights are fetched."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import cage
from support.decoding import NOWHERE, config_of
from support.language_models import spec_of
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from pipeline.errors import ConfigurationError
from pipeline.hub import packages
from pipeline.hub.packages import ATTENTION, WITHOUT_PACKAGES, Need, check_device, check_needs
from pipeline.hub.quantisation import KINDS, METHODS, NOT_READ, find_needs, need_of_kind
from pipeline.hub.sources import resolve_model
from pipeline.runtime.assembly import assemble
from pipeline.worker.weights import load_causal_lm

Tiny = Callable[..., Path]


def quantised(method: str) -> dict[str, Any]:
    """A quantization_config as transformers writes it."""
    config: dict[str, Any] = {"quant_method": method.removesuffix("_4bit").removesuffix("_8bit")}
    if method.startswith("bitsandbytes"):
        config[f"load_in_{method[-4:]}"] = True
    return {**config, "bits": 4} if method == "gptq" else config


def check_packages(
    config: Mapping[str, Any], name: str, *, is_installed: Callable[[str], bool] = packages.is_installed
) -> None:
    check_needs(find_needs(config, name), name, is_installed=is_installed)


def refusal(config: Mapping[str, Any], *, has: Callable[[str], bool] = lambda module: False) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_packages(config, "a/model", is_installed=has)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def configured(folder: Path, target: Path, **settings: Any) -> Path:
    """A copy of a model with other settings in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **settings}))
    return target


def test_every_quantisation_of_transformers_is_known() -> None:
    methods = {quantised(method)["quant_method"] for method in AUTO_QUANTIZER_MAPPING}
    assert methods == METHODS.keys() | NOT_READ.keys()


@pytest.mark.parametrize("method", list(AUTO_QUANTIZER_MAPPING))
def test_a_quantised_model_names_what_to_install(method: str) -> None:
    config = quantised(method)
    name = config["quant_method"]
    for place in ({"quantization_config": config}, {"text_config": {"quantization_config": config}}):
        if name in METHODS:
            installed = METHODS[name].packages.values()
            expected = f"a/model has weights quantised with {name}: pip install {' '.join(installed)}"
            assert refusal(place) == expected
        if name not in NOT_READ:
            check_packages(place, "a/model", is_installed=lambda module: True)


@pytest.mark.parametrize("method", list(AUTO_QUANTIZER_MAPPING))
def test_what_transformers_would_miss_is_missed_here(method: str) -> None:
    """Where transformers' own check of the environment asks for a package, so does this one, before."""
    try:
        AutoHfQuantizer.from_config(quantised(method), pre_quantized=True).validate_environment(device_map=None)
    except ImportError:
        with pytest.raises(ConfigurationError, match=r"pip install|does not load"):
            check_packages({"quantization_config": quantised(method)}, "a/model")
    except (RuntimeError, ValueError):
        pytest.skip("transformers asks for a GPU first")


@pytest.mark.parametrize("method", list(AUTO_QUANTIZER_MAPPING))
def test_what_transformers_runs_on_a_gpu_alone_is_refused_on_a_cpu(method: str) -> None:
    """Where transformers' own check of the environment asks for a GPU, so does this one, before."""
    config, name = quantised(method), quantised(method)["quant_method"]
    if name in NOT_READ:
        pytest.skip("such checkpoints are not read")
    needs = find_needs({"quantization_config": config}, "a/model")
    try:
        AutoHfQuantizer.from_config(config, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, RuntimeError, ValueError) as error:
        asks = "GPU" in str(error) and not torch.cuda.is_available()
        if asks and name != "gptq":  # runs on a CPU where its package is installed, which is asked for before
            with pytest.raises(ConfigurationError, match="needs a GPU"):
                check_device(needs, "a/model", capability=None)
            return
    if METHODS[name].least_gpu is None:
        check_device(needs, "a/model", capability=None)


def test_the_documentation_lists_every_method_and_kind_with_what_it_needs() -> None:
    text = (Path(__file__).parents[1] / "docs/models.md").read_text(encoding="utf-8")
    section = text.partition("## Quantised weights")[2].partition("## Tokens")[0]
    checkpoints = section.partition("Weights can also be quantised")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]*\|[^|]*)\|", checkpoints, re.MULTILINE))
    assert rows.keys() >= METHODS.keys() | NOT_READ.keys()
    for name, facts in METHODS.items():
        packages, _, device = rows[name].partition("|")
        named = {each.strip("'") for each in facts.packages.values()} - {"accelerate"}
        assert set(re.findall(r"`([^`]+)`", packages)) == named
        assert ("CPU" in device) == (facts.least_gpu is None or facts.is_expanded_on_cpu)
    assert all(f"`{kind}`" in section for kind in KINDS)


@pytest.mark.parametrize("kind", list(KINDS))
def test_ways_to_quantise_name_their_packages_and_their_gpu(kind: str) -> None:
    need = need_of_kind(kind)  # type: ignore[arg-type]
    [*_, package] = need.packages.values()
    with pytest.raises(ConfigurationError, match=rf"a/model is to be quantised \({kind}\): pip install .*{package}"):
        check_needs([need], "a/model", is_installed=lambda module: False)
    check_device([need], "a/model", capability=(9, 0))
    if kind == "fp8":
        with pytest.raises(ConfigurationError, match=r"capability 8\.9 or more, and it has 8\.0 on machine m"):
            check_device([need], "a/model", capability=(8, 0), machine="m")


@pytest.mark.parametrize("method", list(NOT_READ))
def test_files_that_cannot_be_read_whatever_is_installed_are_refused(method: str) -> None:
    assert NOT_READ[method] in refusal({"quantization_config": quantised(method)}, has=lambda module: True)


def test_a_quantisation_that_transformers_would_leave_out_is_refused() -> None:
    assert "with exl3: that is not one of aqlm, auto-round, awq" in refusal(
        {"quantization_config": {"quant_method": "exl3"}}
    )
    assert "with a method that is not named" in refusal({"quantization_config": {"bits": 4}})
    assert "bitsandbytes: pip install" in refusal({"quantization_config": {"load_in_8bit": True}})


@pytest.mark.parametrize("attention", list(ATTENTION))
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_installed_is_refused_with_both_ways_out(attention: str, key: str) -> None:
    [package] = ATTENTION[attention].values()
    for stated in (attention, f"paged|{attention}", {"text_config": attention}):
        assert refusal({key: stated}) == (
            f"a/model asks for attn_implementation {attention} in its config.json: pip install {package}, or delete "
            "that key from config.json"
        )
    check_packages({key: attention}, "a/model", is_installed=lambda module: True)


def test_an_attention_of_a_kernel_repository_needs_kernels_and_torchs_own_need_nothing() -> None:
    assert "pip install kernels" in refusal({"attn_implementation": "kernels-community/flash-attn3"})
    for attention in (*WITHOUT_PACKAGES, "paged|sdpa", None, 7, {"": "eager", "text_config": "sdpa"}):
        check_packages({"attn_implementation": attention}, "a/model", is_installed=lambda module: False)


def test_every_attention_of_transformers_is_known() -> None:
    known = {name.removeprefix("paged|") for name in ALL_ATTENTION_FUNCTIONS if not name.startswith("cage_")}
    assert known <= {*WITHOUT_PACKAGES, *ATTENTION}


@pytest.mark.parametrize(
    "attention", ["xformers", "flash_attn", "", "SDPA", "triton\nx", {"text_config": "xformers"}]
)
def test_an_attention_that_transformers_does_not_know_is_refused_with_those_that_it_knows(attention: Any) -> None:
    message = refusal({"attn_implementation": attention}, has=lambda module: True)
    assert (
        "which transformers does not know: delete that key from config.json, or name one of eager, sdpa," in message
    )


GONE = Need("has weights quantised with gptq", {"a_module_that_is_nowhere": "gptqmodel"})


def test_a_host_says_it_as_well_where_only_its_machine_lacks_the_package(tiny: Tiny) -> None:
    spec = spec_of(tiny())
    spec = replace(spec, source=replace(spec.source, needs=(GONE,)))
    line = f"{tiny()} has weights quantised with gptq: pip install gptqmodel on machine {platform.node()}"
    with pytest.raises(ConfigurationError) as caught:
        load_causal_lm(spec, dtype=torch.float32)
    assert str(caught.value) == line


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_over_ray_a_host_s_line_reaches_the_driver_as_it_is(tiny: Tiny) -> None:
    from pipeline.cluster.host_groups import one_replica

    assembly = assemble(config_of(tiny()), NOWHERE)
    (spec,) = assembly.hosts
    lacking = replace(spec, source=replace(spec.source, needs=(GONE,)))
    line = f"{tiny()} has weights quantised with gptq: pip install gptqmodel on machine {platform.node()}"
    with pytest.raises(ConfigurationError) as caught, one_replica(replace(assembly, hosts=(lacking,))):
        pass
    assert str(caught.value) == line  # an error of the configuration ends the command with 2
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("transport", ["local", "ray"])
@pytest.mark.parametrize("command", ["plan", "relabel"])
def test_every_command_says_it_in_one_line_before_weights_are_read(
    tiny: Tiny, tmp_path: Path, command: str, transport: str
) -> None:
    folder = configured(tiny(), tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    job = {
        "input": {"path": str(tmp_path / "in.jsonl")}, "output": {"path": str(tmp_path / "out")},
        "base": {"model": str(folder)}, "principals": {}, "cluster": {"transport": transport},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    missing = [each for module, each in METHODS["gptq"].packages.items() if not packages.is_installed(module)]
    if not missing:
        pytest.skip("everything is installed")
    done = cage(command, "-c", str(tmp_path / "job.yaml"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"cage: {folder} has weights quantised with gptq: pip install {' '.join(missing)}"
    ]
    assert not (tmp_path / "out").exists()


def test_a_model_with_flash_attention_in_its_configuration_is_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    folder = configured(tiny(), tmp_path / "model", attn_implementation="flash_attention_2")
    with pytest.raises(
        ConfigurationError, match=r"model asks for attn_implementation flash_attention_2.*flash-attn, or"
    ):
        resolve_model(str(folder), cache_folder=tmp_path)


def test_a_model_in_blocks_of_float8_has_the_values_that_its_blocks_say(tiny: Tiny, tmp_path: Path) -> None:
    """On a CPU transformers makes ordinary weights of them."""
    block, limit = 32, 448.0
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, weight in load_file(tiny() / "model.safetensors").items():
        stored[name] = plain[name] = weight
        if "_proj" in name:
            blocks = weight.unfold(0, block, block).unfold(1, block, block)
            scales = blocks.abs().amax((2, 3)) / limit
            spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)
            stored[name] = (weight / spread).to(torch.float8_e4m3fn)
            stored[name.replace("weight", "weight_scale_inv")] = scales
            plain[name] = stored[name].float() * spread
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    folder = configured(tiny(), tmp_path / "fp8", quantization_config=settings)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    same = configured(tiny(), tmp_path / "plain")
    save_file(plain, same / "model.safetensors", metadata={"format": "pt"})
    found, expected = (load_causal_lm(spec_of(each), dtype=torch.float32) for each in (folder, same))
    tokens = torch.arange(5, 40)[None]
    assert torch.equal(found(tokens).logits, expected(tokens).logits)
