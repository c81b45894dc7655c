"""Quantised weights at load: transformers' quantisers do it, straight on the model's device.

Where weights are quantised while they are loaded, and where a checkpoint's are, transformers places them itself: a
model that is quantised is not moved or cast as others are.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.hub.packages import check_device, check_needs
from pipeline.hub.sources import ModelSource
from pipeline.sections import QuantizationKind as Kind

COMPUTED_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantised_options(source: ModelSource, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told of a model with quantised weights; nothing for ordinary ones.

    Args:
        source: the model.
        device: where it is to be.
        dtype: what is computed in.

    Raises:
        ConfigurationError: this process lacks a package for them, or the device is of another kind than they need.
    """
    machine = platform.node()
    check_needs(source.needs, source.name, machine=machine)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    check_device(source.needs, source.name, capability=capability, machine=machine)
    if source.quantisation is None:
        return {}
    place = device if device.index is not None or device.type == "cpu" else torch.device("cuda", 0)
    options: dict[str, Any] = {"device_map": {"": place}}
    if source.kind is not None:
        options["quantization_config"] = _config_of(source.kind, source.name, dtype)
    return options


def _config_of(kind: Kind, name: str, dtype: torch.dtype) -> Any:
    """transformers' configuration of a kind. Raises ConfigurationError where the package for it has no such way."""
    from transformers import BitsAndBytesConfig, FineGrainedFP8Config, QuantoConfig, TorchAoConfig

    try:
        match kind:
            case "bnb-4bit":
                return BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=dtype,
                )
            case "bnb-8bit":
                return BitsAndBytesConfig(load_in_8bit=True)
            case "torchao-int8" | "torchao-float8":
                from torchao import quantization as torchao

                is_int = kind == "torchao-int8"
                return TorchAoConfig(torchao.Int8WeightOnlyConfig() if is_int else torchao.Float8WeightOnlyConfig())
            case "quanto-int8":
                return QuantoConfig(weights="int8")
            case "fp8":
                return FineGrainedFP8Config()
    except (ImportError, AttributeError) as error:  # a version that does not go with this torch or transformers
        raise ConfigurationError(f"{name} cannot be quantised ({kind}): {error}") from error
    raise AssertionError(kind)


def compute_in_stated_type(model: nn.Module) -> None:
    """Have bitsandbytes' layers compute in the type that they were told, for any number of rows alike.

    On a CPU with bfloat16 instructions they would compute in bfloat16, whatever the type, and a single row by other
    code than several rows.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary tensor of numbers: some quantised ones are tensors of a class of their own."""
    return (
        isinstance(weight, Tensor)
        and type(weight) in (Tensor, nn.Parameter)
        and type(weight.data) is Tensor
        and weight.dtype in COMPUTED_TYPES
    )


def largest_quantised(model: Any) -> int:
    """Numbers of the largest quantised matrix of a model; 0 where all are ordinary."""
    if getattr(model.config, "quantization_config", None) is None:
        return 0
    linears = [each for each in model.modules() if isinstance(getattr(each, "in_features", None), int)]
    return max(
        (each.in_features * each.out_features for each in linears if not is_plain(getattr(each, "weight", None))),
        default=0,
    )


def why_bits_are_shared(config: Any) -> str | None:
    """Why a row's bits would depend on the rows beside it, where the way of quantisation says so.

    Most of what is computed for all rows together shows in a probe. What only large numbers start does not, and on a
    GPU bits are not probed.

    Args:
        config: of the loaded model, as transformers has it.
    """
    stated = getattr(config, "quantization_config", None)
    threshold = getattr(stated, "llm_int8_threshold", 0.0) if getattr(stated, "load_in_8bit", False) else 0.0
    if threshold > 0:
        return (
            "bitsandbytes computes in 16 bits the columns in which any row of a pass has an outlier "
            f"(llm_int8_threshold {threshold:g})"
        )
    to_dict = getattr(stated, "to_dict", None)
    if _scales_whole_passes(stated if to_dict is None else to_dict()):
        return "its quantisation has one scale for the inputs of all rows of a pass"
    return None


def _scales_whole_passes(tree: Any) -> bool:
    """Whether a quantization_config asks for one scale of activations, taken anew in every pass."""
    if isinstance(tree, list | tuple):
        return any(map(_scales_whole_passes, tree))
    if not isinstance(tree, dict):
        return False
    inputs = tree.get("input_activations")
    if isinstance(inputs, dict) and inputs.get("dynamic") and inputs.get("strategy") == "tensor":
        return True
    if tree.get("_type") == "PerTensor":  # torchao's
        return True
    return any(map(_scales_whole_passes, tree.values()))
