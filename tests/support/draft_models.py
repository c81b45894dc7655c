"""Models that propose tokens: copies of a base that are right some of the time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

SHARES_MOST = 0.24  # of the head's own deviation: a tiny model and its copy share 0.7 of the probability


def perturbed(folder: Path, base: Path, amount: float = SHARES_MOST) -> Path:
    """Write a copy of a model whose head has noise added, in parts of its standard deviation; the folder."""
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.add_(amount * head.std() * torch.randn(head.shape, generator=noise))
    model.save_pretrained(folder)
    return folder


def shared_probability(one: Path, other: Path) -> float:
    """The probability that two models share on average, behind random text."""
    ids = torch.randint(5, 260, (4, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = (AutoModelForCausalLM.from_pretrained(each)(ids).logits.softmax(-1) for each in (one, other))
    return float(torch.minimum(first, second).sum(-1).mean())
