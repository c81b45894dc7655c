"""Packages that a model's config.json asks for: of its quantisation and of its attention.

transformers finds that one is missing when it loads the weights, which may have been fetched for an hour by then.
Here that is known from config.json, without importing transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from pipeline.errors import ConfigurationError

# what transformers' quantizers import, by quant_method: modules, and what is installed for them
ACCELERATE = {"accelerate": "accelerate"}
KERNELS = {"kernels": "kernels"}
QUANTISATION: Mapping[str, Mapping[str, str]] = {
    "aqlm": {**ACCELERATE, "aqlm": "'aqlm[gpu,cpu]'"},
    "auto-round": {"auto_round": "auto-round"},
    "awq": {**ACCELERATE, "gptqmodel": "gptqmodel"},
    "bitnet": ACCELERATE,
    "bitsandbytes": {**ACCELERATE, "bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "eetq": {**ACCELERATE, **KERNELS},
    "fbgemm_fp8": {**ACCELERATE, "fbgemm_gpu": "fbgemm-gpu"},
    "fouroversix": {"fouroversix": "fouroversix"},
    "fp8": ACCELERATE,
    "fp_quant": {"fp_quant": "fp_quant"},
    "gemma": {},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "higgs": {**ACCELERATE, "flute": "flute-kernel", "fast_hadamard_transform": "fast_hadamard_transform"},
    "hqq": {"hqq": "hqq"},
    "metal": {},  # becomes the original type where there is no GPU of Apple's
    "mxfp4": ACCELERATE,
    "mxfp8": ACCELERATE,
    "quanto": {**ACCELERATE, "optimum.quanto": "optimum-quanto"},
    "quark": {"quark": "amd-quark"},
    "sinq": {"sinq": "sinq"},
    "spqr": {**ACCELERATE, "spqr_quant": "'spqr_quant[gpu]'"},
    "torchao": {"torchao": "torchao"},
    "vptq": {**ACCELERATE, "vptq": "vptq"},
}
NOT_READ = {
    "gguf": "GGUF files are not read; name the model that they were made from",
    "nvfp4": "transformers does not load such checkpoints; name the model that it was made from",
}
# by attn_implementation; what is not here needs no package
ATTENTION: Mapping[str, Mapping[str, str]] = {
    "flash_attention_2": {"flash_attn": "flash-attn"},
    "flash_attention_3": {"flash_attn_interface": "flash-attn-3"},
    "flash_attention_4": {"flash_attn": "flash-attn-4"},
}


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without doing so."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing, or broken
        return False


def check_packages(
    config: Mapping[str, Any], name: str, *, is_installed: Callable[[str], bool] = is_installed
) -> None:
    """Check that what a model's config.json asks for is installed.

    Args:
        config: of config.json.
        name: of the model, for messages.
        is_installed: whether a module can be imported.

    Raises:
        ConfigurationError: something is not, and what to install.
    """
    for part in _parts(config):
        for asked, packages, or_else in (*_of_quantisation(part, name), *_of_attention(part)):
            if missing := [package for module, package in packages.items() if not is_installed(module)]:
                raise ConfigurationError(f"{name} {asked}: pip install {' '.join(missing)}{or_else}")


def _of_quantisation(config: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, str], str]]:
    """What is asked for, its packages, and what else helps. Raises ConfigurationError where nothing does."""
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, Mapping):
        method = _method(quantisation)
        if method not in QUANTISATION:
            reason = NOT_READ.get(method, f"that is not one of {', '.join(QUANTISATION)}")
            raise ConfigurationError(f"{name} has weights quantised with {method}: {reason}")
        yield f"has weights quantised with {method}", QUANTISATION[method], ""


def _of_attention(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, str], str]]:
    for attention in _attentions(config):
        packages = KERNELS if "/" in attention else ATTENTION.get(attention, {})
        asked = f"asks for attn_implementation {attention} in its config.json"
        yield asked, packages, ", or delete that key from config.json"


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those within it, such as the language model's of a multimodal one."""
    yield config
    yield from (part for key, part in config.items() if key.endswith("_config") and isinstance(part, Mapping))


def _method(quantisation: Mapping[str, Any]) -> str:
    if quantisation.get("load_in_8bit") or quantisation.get("load_in_4bit"):
        return "bitsandbytes"  # files of its first years do not say so
    return str(quantisation.get("quant_method", "a method that is not named"))


def _attentions(config: Mapping[str, Any]) -> Iterator[str]:
    for key in ("attn_implementation", "_attn_implementation"):
        stated = config.get(key)
        named = stated.values() if isinstance(stated, Mapping) else [stated]
        yield from (each.removeprefix("paged|") for each in named if isinstance(each, str))
