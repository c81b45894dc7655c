"""Tiny models with heads as different trainers write them, and their scores by plain passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS = "model.safetensors"


def with_head(
    source: Path,
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    drop: Sequence[str] = ("lm_head.weight",),
    **config: Any,
) -> Path:
    """A copy of a causal LM's folder with other weights beside its own, and other values in its config.json."""
    shutil.copytree(source, folder)
    own = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in own.items() if name not in drop}
    save_file({**kept, **tensors}, folder / WEIGHTS, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def random(*shape: int, seed: int, scale: float = 0.5) -> Tensor:
    """A random matrix."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class PlainStates:
    """Hidden states of texts by whole passes of the model that a head was put on.

    Args:
        folder: of the causal LM.
        adapter: of a LoRA adapter on it.
    """

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if adapter is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, adapter).eval().get_base_model()
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def last(self, ids: Sequence[int]) -> Tensor:
        """The hidden state [H] of the last token."""
        state: Tensor = self.model.base_model(torch.tensor([list(ids)])).last_hidden_state[0, -1]
        return state

    def prompt(self, text: str) -> list[int]:
        """The prompt of one message of the user."""
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
