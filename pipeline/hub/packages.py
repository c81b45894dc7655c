"""Packages that a model's config.json asks for: of its quantisation and of its attention.

transformers finds that one is missing when it loads the weights, which may have been fetched for an hour by then.
Here that is known from config.json, without importing transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.quoting import quote

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
# by attn_implementation
WITHOUT_PACKAGES = ("eager", "sdpa", "flex_attention")
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


@dataclass(frozen=True, slots=True)
class Need:
    """What a model asks for.

    Args:
        asked: in words that go on from the model's name.
        packages: what is installed for it, by the module that is then there.
        or_else: what helps instead, in words; empty where nothing does.
    """

    asked: str
    packages: Mapping[str, str] = field(hash=False)
    or_else: str = ""


def find_needs(config: Mapping[str, Any], name: str) -> tuple[Need, ...]:
    """What a model asks for in its config.json beyond transformers and torch.

    Args:
        config: of config.json.
        name: of the model, for messages.

    Raises:
        ConfigurationError: something that no package gives.
    """
    found = [need for part in _parts(config) for need in (*_of_quantisation(part, name), *_of_attention(part, name))]
    return tuple(need for need in found if need.packages)


def check_needs(
    needs: Iterable[Need],
    name: str,
    *,
    machine: str | None = None,
    is_installed: Callable[[str], bool] = is_installed,
) -> None:
    """Check that what a model asks for is installed for this process.

    Args:
        needs: as `find_needs` gives them.
        name: of the model, for messages.
        machine: where this is, for messages; None where that is plain.
        is_installed: whether a module can be imported.

    Raises:
        ConfigurationError: something is not, and what to install.
    """
    for need in needs:
        if missing := [package for module, package in need.packages.items() if not is_installed(module)]:
            where = "" if machine is None else f" on machine {machine}"
            raise ConfigurationError(f"{name} {need.asked}: pip install {' '.join(missing)}{where}{need.or_else}")


def _of_quantisation(config: Mapping[str, Any], name: str) -> Iterator[Need]:
    """What is asked for. Raises ConfigurationError where nothing gives it."""
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, Mapping):
        method = _method(quantisation)
        if method not in QUANTISATION:
            reason = NOT_READ.get(method, f"that is not one of {', '.join(QUANTISATION)}")
            raise ConfigurationError(f"{name} has weights quantised with {method}: {reason}")
        yield Need(f"has weights quantised with {method}", QUANTISATION[method])


def _of_attention(config: Mapping[str, Any], name: str) -> Iterator[Need]:
    for attention in _attentions(config):
        asked = f"asks for attn_implementation {quote(attention)[1:-1]} in its config.json"
        if "/" not in attention and attention not in (*ATTENTION, *WITHOUT_PACKAGES):
            known = ", ".join((*WITHOUT_PACKAGES, *ATTENTION))
            raise ConfigurationError(
                f"{name} {asked}, which transformers does not know: delete that key from config.json, or name one of "
                f"{known}"
            )
        packages = KERNELS if "/" in attention else ATTENTION.get(attention, {})
        yield Need(asked, packages, ", or delete that key from config.json")


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
