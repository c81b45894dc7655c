"""Adapters that depend on a preference vector (PBLoRA, of PARM), as plain LoRA adapters.

Such an adapter adds dW(p) = s (B1 W1 A1 + B2 W2(p) A2) to a projection, with s = alpha / r2 and
W2(p) = sum_i p_i W2_i. This is linear in p: for a fixed vector it is a LoRA adapter of rank r1 + r2, and for any
vector one of rank r1 + k r2 whose last ranks are scaled by p_1, ..., p_k. (Lin et al., PARM, ICML 2025.)

A folder has adapter_config.json with peft_type PBLORA, r1, r2, obj_num (k), lora_alpha and, where they were trained
here, the objectives' names; and the tensors MODULE.pblora_A [r1 + r2, in], pblora_B [out, r1 + r2],
pblora_W1 [r1, r1] and pblora_W2 [k, r2 * r2].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigurationError
from pipeline.hub.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LocalTree, read_json

if TYPE_CHECKING:
    from torch import Tensor

PEFT_TYPE = "PBLORA"
ALPHA = 8  # of PARM, where the configuration states none
PARTS = ("A", "B", "W1", "W2")
KEPT = ("base_model_name_or_path", "target_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out")


@dataclass(frozen=True, slots=True)
class PreferenceForm:
    """The form of an adapter that depends on a preference vector.

    Args:
        fixed_rank: r1, of the part that does not depend on it.
        rank: r2, of the part that does.
        alpha: LoRA's alpha; both parts are scaled by alpha / r2.
        objectives: their names, or "0", "1" and so on where the adapter has none.
    """

    fixed_rank: int
    rank: int
    alpha: float
    objectives: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / self.rank

    def index(self, objective: str) -> int | None:
        """The number of an objective, by its name or as a number; None where there is none."""
        if objective in self.objectives:
            return self.objectives.index(objective)
        return int(objective) if objective.isdecimal() and int(objective) < len(self.objectives) else None


def read_form(config: Mapping[str, Any], name: str) -> PreferenceForm | None:
    """The form that an adapter's configuration states; None of an adapter that depends on no preference vector.

    Args:
        config: adapter_config.json.
        name: of the adapter, for messages.

    Raises:
        ConfigurationError: a size is missing or impossible, or it does more than this form.
    """
    if config.get("peft_type") != PEFT_TYPE:
        return None
    sizes = {key: config.get(key) for key in ("r1", "r2", "obj_num")}
    alpha = config.get("lora_alpha", ALPHA)
    wrong = [f"{key}: {value}" for key, value in sizes.items() if type(value) is not int or value < 1]
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        wrong.append(f"lora_alpha: {alpha}")
    if wrong:
        raise ConfigurationError(f"adapter {name}: {', '.join(wrong)} in {ADAPTER_CONFIG} must be a positive number")
    if config.get("bias", "none") != "none" or config.get("modules_to_save"):
        raise ConfigurationError(f"adapter {name} brings biases or whole modules beside PBLoRA, which is not served")
    count = int(sizes["obj_num"] or 0)
    names = tuple(config.get("objectives") or map(str, range(count)))
    if len(names) != count or len(set(names)) != count:
        raise ConfigurationError(f"adapter {name}: objectives must be {count} different names; got {names}")
    return PreferenceForm(int(sizes["r1"] or 0), int(sizes["r2"] or 0), float(alpha), names)


def write_as_lora(folder: Path, target: Path, *, objective: int | None) -> None:
    """Write a plain LoRA adapter that is equal to one that depends on a preference vector.

    Args:
        folder: of the adapter.
        target: a folder, made for it.
        objective: its unit vector; None: all objectives, each with weight 1, the ranks in the order of the objectives
            after r1 ranks that depend on none.

    Raises:
        ConfigurationError: a tensor is missing or has another shape than the configuration says.
    """
    from safetensors.torch import load_file, save_file

    config = read_json(LocalTree(folder), ADAPTER_CONFIG)
    form = read_form(config, str(folder))
    assert form is not None
    stored = load_file(folder / ADAPTER_WEIGHTS)
    tensors: dict[str, Tensor] = {}
    for module, parts in sorted(_by_module(stored, str(folder)).items()):
        _check_shapes(module, parts, form, str(folder))
        down, up = _fold(parts, form, range(len(form.objectives)) if objective is None else [objective])
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down, up
    rank = form.fixed_rank + form.rank * (len(form.objectives) if objective is None else 1)
    lora = {
        **{key: config[key] for key in KEPT if key in config},
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": form.scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (target / ADAPTER_CONFIG).write_text(json.dumps(lora, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _by_module(stored: Mapping[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """The parts of each module by its name in the file."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        module, _, part = key.removesuffix(".default").rpartition(".pblora_")
        if not module or part not in PARTS:
            raise ConfigurationError(f"adapter {name} cannot be used whole: {key} is no part of PBLoRA")
        modules.setdefault(module, {})[part] = tensor
    if not modules:
        raise ConfigurationError(f"adapter {name} cannot be used whole: its file holds no weights")
    for module, parts in modules.items():
        if missing := [f"{module}.pblora_{part}" for part in PARTS if part not in parts]:
            raise ConfigurationError(f"adapter {name} cannot be used whole: its file lacks {', '.join(missing)}")
    return modules


def _check_shapes(module: str, parts: Mapping[str, Tensor], form: PreferenceForm, name: str) -> None:
    both = form.fixed_rank + form.rank
    wanted = {
        "A": (both, parts["A"].shape[-1]),
        "B": (parts["B"].shape[0], both),
        "W1": (form.fixed_rank, form.fixed_rank),
        "W2": (len(form.objectives), form.rank**2),
    }
    for part, shape in wanted.items():
        if tuple(parts[part].shape) != shape:
            raise ConfigurationError(
                f"adapter {name} cannot be used whole: {module}.pblora_{part} has the shape "
                f"{tuple(parts[part].shape)}, and {ADAPTER_CONFIG} says {shape}"
            )


def _fold(parts: Mapping[str, Tensor], form: PreferenceForm, objectives: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The products down [R, in] and up [out, R] with the middle matrices folded into the first."""
    import torch

    first, rank = form.fixed_rank, form.rank
    down, up, middle = parts["A"].float(), parts["B"].float(), parts["W2"].float().view(-1, rank, rank)
    folded = [parts["W1"].float() @ down[:first], *(middle[at] @ down[first:] for at in objectives)]
    return torch.cat(folded), torch.cat([up[:, :first], *[up[:, first:]] * len(objectives)], 1).contiguous()
