"""Tiny models of every family in folders, with a tokenizer, as a user's models would be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.families.configurations import VOCAB_SIZE, make_random_model
from support.tiny_models import make_tokenizer


def make_family(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a random model of a family with the tokenizer of bytes."""
    tokenizer = make_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE
    model = make_random_model(name, seed=seed)
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.inference_mode()
def generated_logprobs(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log-probabilities [T] of an answer's tokens where `generate` is made to give it."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False,
        eos_token_id=None, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda _, text: [answer[len(text) - len(prompt)]],
    )  # fmt: skip
    logprobs = torch.stack(out.logits)[:, 0].double().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
