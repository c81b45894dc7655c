"""Checkpoints with quantised weights, written as the tools that make them write them, and their plain equals.

Each function gives the tensors of a file, and the values that they stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
BLOCK = 32
# values of four bits with one of mantissa, by their code; the upper half is negative
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Quantise = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def write_pair(source: Path, folder: Path, quantise: Quantise, settings: Mapping[str, Any]) -> tuple[Path, Path]:
    """A checkpoint with quantised projections, and one with the values that they stand for.

    Args:
        source: of an ordinary model.
        folder: for both.
        quantise: what a file has in place of a projection's weight, and what that stands for.
        settings: the quantization_config.
    """
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith(("_proj.weight", "_proj")):
            tensors, plain[name] = quantise(name.removesuffix(".weight"), weight)
            stored |= tensors
        else:
            stored[name] = plain[name] = weight
    quantised, same = folder / "quantised", folder / "plain"
    for target, tensors in ((quantised, stored), (same, plain)):
        shutil.copytree(source, target)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": dict(settings)}))
    return quantised, same


def _in_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 to 15 [I, O] with 8 for zero, scales [I / GROUP, O], and the values that they stand for [O, I]."""
    columns = weight.float().T
    groups = columns.reshape(-1, GROUP, columns.shape[1])
    scales = (groups.abs().amax(1) / 7).half()
    codes = (groups / scales.float()[:, None]).round().add(8).clamp(0, 15)
    values = ((codes - 8) * scales.float()[:, None]).reshape(columns.shape).T
    return codes.reshape(columns.shape).long(), scales, values


def _packed(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight codes of 4 bits along the last dimension in one int32, the lowest bits first."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)
    words = sum(eights[..., each] << (4 * at) for at, each in enumerate(order))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As GPTQ's first format has it: packed along the inputs, zeros less one."""
    codes, scales, values = _in_groups(weight)
    return {
        f"{name}.qweight": _packed(codes.T).T,
        f"{name}.qzeros": _packed(torch.full(scales.shape, 7)),
        f"{name}.scales": scales,
        f"{name}.g_idx": (torch.arange(len(codes)) // GROUP).int(),
    }, values


def awq(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As AutoAWQ has it: packed along the outputs, in an order of its own."""
    codes, scales, values = _in_groups(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        f"{name}.qweight": _packed(codes, order),
        f"{name}.qzeros": _packed(torch.full(scales.shape, 8), order),
        f"{name}.scales": scales,
    }, values


def packed_int4(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors has it (pack-quantized, by group, symmetric)."""
    codes, scales, values = _in_groups(weight)
    return {
        f"{name}.weight_packed": _packed(codes.T),
        f"{name}.weight_scale": scales.T.float(),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }, values


def float8_channels(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors has it (float-quantized, a scale for each output)."""
    scales = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales}, codes.float() * scales


def float8_blocks(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As DeepSeek-V3's FP8 has it: a scale for each block."""
    blocks = weight.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)
    scales = blocks.abs().amax((2, 3)) / 448
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, codes.float() * spread


def float4_blocks(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As gpt-oss has its experts (MXFP4): 32 inputs share a power of two. Other projections stay as they are."""
    if ".experts." not in name:
        return {f"{name}.weight": weight}, weight
    inputs = weight.float().transpose(1, 2)  # [experts, outputs, inputs]
    groups = inputs.reshape(*inputs.shape[:2], -1, 32)
    exponents = groups.abs().amax(-1).clamp(min=2.0**-20).log2().floor() - 2
    table = torch.tensor([*FP4, *(-each for each in FP4)])
    codes = ((groups / exponents.exp2()[..., None])[..., None] - table).abs().argmin(-1)
    values = table[codes] * exponents.exp2()[..., None]
    return {
        f"{name}_blocks": (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8),
        f"{name}_scales": (exponents + 127).to(torch.uint8),
    }, values.reshape(inputs.shape).transpose(1, 2)


def float8_groups(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As MXFP8 has it: 32 inputs share a power of two, which is stored as a byte."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    exponents = (groups.abs().amax(-1).clamp(min=2.0**-100) / 448).log2().ceil()
    codes = (groups / exponents.exp2()[..., None]).to(torch.float8_e4m3fn)
    values = (codes.float() * exponents.exp2()[..., None]).reshape(weight.shape)
    scales = (exponents + 127).to(torch.uint8)
    return {f"{name}.weight": codes.reshape(weight.shape), f"{name}.weight_scale_inv": scales}, values


def affine(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """As MLX's tools have it for Apple's GPUs: codes of 4 bits, with a scale and the lowest value of each group."""
    groups = weight.float().reshape(len(weight), -1, 64)
    lowest = groups.amin(-1)
    scales = ((groups.amax(-1) - lowest) / 15).clamp(min=1e-8)
    codes = ((groups - lowest[..., None]) / scales[..., None]).round().clamp(0, 15)
    values = (codes * scales[..., None] + lowest[..., None]).reshape(weight.shape)
    packed = _packed(codes.reshape(weight.shape).long()).view(torch.uint32)
    return {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.qbiases": lowest}, values


def _compressed(kind: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "format": kind}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


# how a projection is written, and the quantization_config, by a name for tests; the packages are transformers' own
WRITTEN: Mapping[str, tuple[Quantise, Mapping[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "compressed-tensors int4": (
        packed_int4,
        _compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}),
    ),
    "compressed-tensors float8": (
        float8_channels,
        _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ),
    "fp8": (
        float8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]},
    ),
    "mxfp8": (
        float8_groups,
        {
            "quant_method": "mxfp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, GROUP],
            "scale_fmt": "ue8m0",
        },
    ),
    "metal": (affine, {"quant_method": "metal", "bits": 4, "group_size": 64}),
    "mxfp4": (float4_blocks, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "self_attn", "router"]}),
}
