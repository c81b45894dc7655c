"""Adapters that depend on a preference vector, made in the layout that PARM publishes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM


def make_preference_adapter(
    folder: Path, model: Path, *, targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"), seed: int = 0,
    fixed_rank: int = 3, rank: int = 2, num_objectives: int = 2, alpha: int = 8, size: float = 0.3, **config: Any,
) -> Path:  # fmt: skip
    """Random PBLoRA of some linear layers; `config` is added to its configuration."""
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in AutoModelForCausalLM.from_pretrained(model).named_modules():
        if name.endswith(targets):
            place = f"base_model.model.{name}.pblora_"
            shapes = {
                "A": (fixed_rank + rank, module.in_features),
                "B": (module.out_features, fixed_rank + rank),
                "W1": (fixed_rank, fixed_rank),
                "W2": (num_objectives, rank**2),
            }
            tensors |= {place + part: size * torch.randn(shape) for part, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    stated = {
        "peft_type": "PBLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "bias": "none",
        "r1": fixed_rank, "r2": rank, "obj_num": num_objectives, "lora_alpha": alpha, "lora_dropout": 0.05,
        "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None, "pref_vec_init": None,
        "target_modules": list(targets), "layers_to_transform": None, "layers_pattern": None, "revision": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    return folder


def merged(model: Path, folder: Path, preference: list[float]) -> Any:
    """The model with dW(p) = alpha/r2 (B1 W1 A1 + B2 W2(p) A2) added to its weights."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    first, rank = config["r1"], config["r2"]
    stored = load_file(folder / "adapter_model.safetensors")
    found = AutoModelForCausalLM.from_pretrained(model).eval()
    modules = dict(found.named_modules())
    for key in [key for key in stored if key.endswith("_A")]:
        place = key.removesuffix("A")
        down, up, fixed, middle = (stored[place + part] for part in ("A", "B", "W1", "W2"))
        chosen = (torch.tensor(preference) @ middle).view(rank, rank)
        change = up[:, :first] @ fixed @ down[:first] + up[:, first:] @ chosen @ down[first:]
        weight = modules[place.removeprefix("base_model.model.").removesuffix(".pblora_")].weight
        with torch.no_grad():
            weight += config["lora_alpha"] / rank * change
    return found
