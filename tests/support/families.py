"""Tiny models of every family in folders, with a tokenizer, as a user's models would be."""

from __future__ import annotations

from pathlib import Path

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
