"""Mixtures of experts whose rows do not depend on how many tokens chose an expert.

An expert's matrix product has as many rows as tokens that chose it, and on some CPUs kernels for fewer than four rows
give other bits. So every expert is given at least that many. On CPUs with MKL's strict reproducible mode products of
any number of rows agree, and the model's own experts are used.

T tokens of a pass, C choices of each, H hidden width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pipeline.worker.captured_passes import MIN_ROWS
from pipeline.worker.cpu_kernels import has_reproducible_kernels

PADDED = "cage_padded"
NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_config")


def needs_own_experts(model: Any) -> bool:
    """Whether the model is a mixture of experts."""
    text = model.config.get_text_config()
    return any(getattr(text, name, None) for name in NUMBERS_OF_EXPERTS)


def can_pad_experts(model: Any) -> bool:
    """Whether the model computes its experts by transformers' interface, so that they can be replaced."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return any(part._can_set_experts_implementation() for part in parts)


def pad_experts(model: Any) -> bool:
    """Have few tokens of an expert computed as more, where this CPU needs it.

    Returns:
        Whether the model computes its experts by code of its own, so that `WholeVectors` has to do it.
    """
    if has_reproducible_kernels() or not needs_own_experts(model):
        return False
    if can_pad_experts(model):
        model.set_experts_implementation(PADDED)
        return False
    return True


def padded_experts(module: Any, states_TH: Tensor, experts_TC: Tensor, weights_TC: Tensor) -> Tensor:
    """The weighted sum of the chosen experts' outputs, [T, H]; as transformers calls it.

    Args:
        module: holds the experts' weights.
        states_TH: inputs.
        experts_TC: the experts that each token chose; a number beyond the last expert means none.
        weights_TC: the weight of each choice.
    """
    num_tokens, num_choices = experts_TC.shape
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    up_bias = getattr(module, f"{name}_bias") if module.has_bias else None
    down_bias = module.down_proj_bias if module.has_bias else None
    out = states_TH.new_zeros(num_tokens * num_choices, states_TH.shape[-1])
    chosen, weights = experts_TC.reshape(-1), weights_TC.reshape(-1)
    for expert in sorted(set(chosen.tolist())):
        if expert >= up.shape[0]:
            continue
        at = (chosen == expert).nonzero()[:, 0]
        rows = pad(states_TH[at // num_choices], (0, 0, 0, max(0, MIN_ROWS - len(at))))
        inner = _product(rows, up[expert], None if up_bias is None else up_bias[expert], module.is_transposed)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        result = _product(inner, down[expert], None if down_bias is None else down_bias[expert], module.is_transposed)
        if getattr(module, "has_post_expert_norm", False):
            result = module.post_expert_norm(result)
        out[at] = (result[: len(at)] * weights[at, None]).to(out.dtype)
    # summed in the order of a token's choices, whatever the other tokens chose
    return out.view(num_tokens, num_choices, -1).sum(1).to(states_TH.dtype)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    out = rows @ weight if is_transposed else linear(rows, weight)
    return out if bias is None else out + bias


ALL_EXPERTS_FUNCTIONS.register(PADDED, padded_experts)
