"""Quantised weights: what transformers' quantisers need, for checkpoints that are quantised and while one is loaded.

The methods are those of transformers' `AUTO_QUANTIZER_MAPPING`. What a method needs is known here without importing
transformers: the packages, and the device. transformers finds out when it loads the weights, which may have been
fetched for an hour by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pipeline.errors import ConfigurationError
from pipeline.hub.packages import KERNELS, Need, needs_of_attention, parts_of
from pipeline.sections import QuantizationKind as Kind

ANY_GPU = (0, 0)
ACCELERATE = {"accelerate": "accelerate"}
BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True, slots=True)
class Method:
    """What a way of quantisation needs.

    Args:
        packages: what is installed for it, by the module that is then there.
        least_gpu: the compute capability that it needs at least; None: it runs on a CPU, too.
        is_expanded_on_cpu: on a CPU transformers makes ordinary weights of it.
    """

    packages: Mapping[str, str] = field(hash=False)
    least_gpu: tuple[int, int] | None = None
    is_expanded_on_cpu: bool = False


# by the quant_method in a checkpoint's config.json; accelerate puts quantised weights on their device
METHODS: Mapping[str, Method] = {
    "aqlm": Method({**ACCELERATE, "aqlm": "'aqlm[gpu,cpu]'"}),
    "auto-round": Method({**ACCELERATE, "auto_round": "auto-round"}),
    "awq": Method({**ACCELERATE, "gptqmodel": "gptqmodel"}),
    "bitnet": Method(ACCELERATE),
    BITSANDBYTES: Method({**ACCELERATE, "bitsandbytes": "bitsandbytes"}),
    "compressed-tensors": Method({**ACCELERATE, "compressed_tensors": "compressed-tensors"}),
    "eetq": Method({**ACCELERATE, **KERNELS}, ANY_GPU),
    "fbgemm_fp8": Method({**ACCELERATE, "fbgemm_gpu": "fbgemm-gpu"}, (9, 0)),
    "fouroversix": Method({**ACCELERATE, "fouroversix": "fouroversix"}, ANY_GPU),
    "fp8": Method(ACCELERATE, is_expanded_on_cpu=True),
    "fp_quant": Method({**ACCELERATE, "fp_quant": "fp_quant"}, ANY_GPU),
    "gemma": Method(ACCELERATE),
    "gptq": Method({**ACCELERATE, "optimum": "optimum", "gptqmodel": "gptqmodel"}),
    "higgs": Method(
        {**ACCELERATE, "flute": "flute-kernel", "fast_hadamard_transform": "fast_hadamard_transform"}, ANY_GPU
    ),
    "metal": Method(ACCELERATE, is_expanded_on_cpu=True),  # on NVIDIA's GPUs as well: it is for Apple's
    "mxfp4": Method(ACCELERATE, is_expanded_on_cpu=True),
    "mxfp8": Method(ACCELERATE, is_expanded_on_cpu=True),
    "quanto": Method({**ACCELERATE, "optimum.quanto": "optimum-quanto"}),
    "quark": Method({**ACCELERATE, "quark": "amd-quark"}),
    "sinq": Method({**ACCELERATE, "sinq": "sinq"}),
    "spqr": Method({**ACCELERATE, "spqr_quant": "'spqr_quant[gpu]'"}, ANY_GPU),
    "torchao": Method({**ACCELERATE, "torchao": "torchao"}),
    "vptq": Method({**ACCELERATE, "vptq": "vptq"}, ANY_GPU),
}
NOT_READ = {
    "gguf": "GGUF files are not read; name the model that they were made from",
    "hqq": "transformers 5 does not load such checkpoints; name the model that it was made from",
    "nvfp4": "transformers does not load such checkpoints; name the model that it was made from",
}


@dataclass(frozen=True, slots=True)
class _KindFacts:
    """A way to quantise weights while they are loaded.

    Args:
        method: its quant_method.
        bits: of one weight, the scales of its group included.
        needs_gpu: the compute capability that it needs at least, where the method's checkpoints need less.
    """

    method: str
    bits: float
    needs_gpu: tuple[int, int] | None = None


KINDS: Mapping[Kind, _KindFacts] = {
    "bnb-4bit": _KindFacts(BITSANDBYTES, 4 + 8 / 64 + 32 / (64 * 256)),  # scales of 64 in 8 bits, theirs of 256 in 32
    "bnb-8bit": _KindFacts(BITSANDBYTES, 8),
    "torchao-int8": _KindFacts("torchao", 8),
    "torchao-float8": _KindFacts("torchao", 8),
    "quanto-int8": _KindFacts("quanto", 8),
    "fp8": _KindFacts("fp8", 8 + 32 / 128**2, (8, 9)),
}
assert set(KINDS) == set(get_args(Kind))


def stored_method(config: Mapping[str, Any], name: str) -> str | None:
    """The quant_method of a checkpoint; None of one with ordinary weights.

    Args:
        config: of config.json, or a part of it.
        name: of the model, for messages.

    Raises:
        ConfigurationError: transformers cannot load such weights.
    """
    stated = config.get("quantization_config")
    if not isinstance(stated, Mapping):
        return None
    is_old = stated.get("load_in_8bit") or stated.get("load_in_4bit")  # files of bitsandbytes' first years
    method = BITSANDBYTES if is_old else str(stated.get("quant_method", "a method that is not named"))
    if method not in METHODS:
        reason = NOT_READ.get(method, f"that is not one of {', '.join(METHODS)}")
        raise ConfigurationError(f"{name} has weights quantised with {method}: {reason}")
    return method


def computing_packages(method: str) -> tuple[str, ...]:
    """The distributions that compute with quantised weights."""
    named = {each.strip("'").partition("[")[0] for each in METHODS[method].packages.values()}
    return tuple(sorted(named - {"accelerate"}))


def need_of_checkpoint(config: Mapping[str, Any], name: str) -> Need | None:
    """What the quantised weights of a checkpoint need. Raises ConfigurationError where nothing loads them."""
    method = stored_method(config, name)
    if method is None:
        return None
    facts = METHODS[method]
    return Need(f"has weights quantised with {method}", facts.packages, least_gpu=facts.least_gpu)


def need_of_kind(kind: Kind) -> Need:
    """What it takes to quantise weights while they are loaded."""
    facts = KINDS[kind]
    least_gpu = facts.needs_gpu or METHODS[facts.method].least_gpu
    return Need(f"is to be quantised ({kind})", METHODS[facts.method].packages, least_gpu=least_gpu)


def find_needs(config: Mapping[str, Any], name: str) -> tuple[Need, ...]:
    """What a model asks for in its config.json beyond transformers and torch.

    Args:
        config: of config.json.
        name: of the model, for messages.

    Raises:
        ConfigurationError: something that no package gives.
    """
    of_weights = [need_of_checkpoint(part, name) for part in parts_of(config)]
    return (*(need for need in of_weights if need is not None), *needs_of_attention(config, name))
