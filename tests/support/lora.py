"""Random LoRA adapters of tiny models, written to folders as peft writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def make_lora(folder: Path, model: Path, *targets: str, seed: int = 0, **options: Any) -> Path:
    """An adapter of some modules of the model; `options` are peft's."""
    import peft

    base = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        **{"target_modules": list(targets), "r": 4, **options},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=base.config.model_type == "gpt2",
    )
    wrapped = peft.get_peft_model(base, config)
    with torch.no_grad():  # modules that come as a whole begin as copies
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.3)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder
