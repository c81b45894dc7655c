"""What the decoding benchmarks decode: models of a named shape, prompts and answers of given lengths."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.config import Config, Reproducibility
from pipeline.config_files import parse_config
from pipeline.decoding.assembly import Assembly
from pipeline.decoding.lineup import build_lineup
from pipeline.decoding.prompts import Prompter
from pipeline.models.loading import pick_device, pick_dtype
from pipeline.models.messages import HostSpec
from pipeline.models.sources import resolve_model
from pipeline.records import Message, Row
from pipeline.variants import lay_out

# Llama architectures; the names say how many parameters they have.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32_000, "tie_word_embeddings": False},
}  # fmt: skip
PRINCIPLE_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts (by role) and the number of tokens of each one's answer."""

    prompts: Sequence[Mapping[str, Sequence[int]]]
    lengths: Sequence[int]

    @property
    def rows(self) -> list[Row]:
        """One row a prompt; its text is the prompt's number."""
        return [
            Row(str(at), ({"role": "user", "content": str(at)},), max_new_tokens=length)
            for at, length in enumerate(self.lengths)
        ]

    def first(self, num_rows: int) -> Work:
        return Work(self.prompts[:num_rows], self.lengths[:num_rows])


class GivenPrompts:
    """In place of a `Prompter`: token ids that are given; no token ends an answer."""

    stop_ids: frozenset[int] = frozenset()

    def __init__(self, prompts: Sequence[Mapping[str, Sequence[int]]]) -> None:
        self._prompts = prompts

    def encode(self, messages: Sequence[Message]) -> Mapping[str, Sequence[int]]:
        return self._prompts[int(messages[0]["content"])]

    def heads(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> dict[str, int]:
        return {role: 0 if role == "base" else PRINCIPLE_TOKENS for role in prompts}

    def room(self, prompts: Mapping[str, Sequence[int]]) -> None:
        return None

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def save_random_model(shape: str, folder: Path) -> Path:
    """Write a Llama of this shape with random weights. Raises KeyError for an unknown shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = pick_device("auto")
    torch.manual_seed(0)
    torch.set_default_dtype(pick_dtype("auto", device))
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=8192))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return folder


def make_work(
    roles: Sequence[str], *, num_rows: int, vocab_size: int, mean_length: int, max_length: int, seed: int = 0
) -> Work:
    """Prompts of 16 to 64 tokens; answers of geometric lengths, cut at `max_length`. A principal's prompt is its
    principle, the same for every row, and the row's prompt."""
    chance = random.Random(seed)
    principles = {role: _tokens(chance, PRINCIPLE_TOKENS, vocab_size) for role in roles if role != "base"}
    prompts, lengths = [], []
    for _ in range(num_rows):
        prompt = _tokens(chance, chance.randint(16, 64), vocab_size)
        prompts.append({role: [*principles.get(role, ()), *prompt] for role in roles})
        length = 1
        while length < max_length and chance.random() >= 1 / mean_length:
            length += 1
        lengths.append(length)
    return Work(prompts, lengths)


def make_config(
    model: str, *, num_principals: int, slots: int, max_length: int, strict: bool, candidates: int | str
) -> Config:
    """Prompted principals on one base: as many roles of one set of weights as principals, and the base."""
    principal = {"kind": "prompted", "principle": "given by token ids", "weight": 1 / max(num_principals, 1)}
    return parse_config(
        {
            "input": {"path": "none"},
            "output": {"path": "none"},
            "base": model,
            "principals": {f"p{at}": {**principal, "principle": f"p{at}"} for at in range(num_principals)},
            "decoding": {
                "max_new_tokens": max_length,
                "candidates": candidates,
                "agent_temperature": 1.0,
                "trace": "summary",
                "reproducibility": str(Reproducibility.STRICT if strict else Reproducibility.RELAXED),
            },
            "cluster": {"slots": slots},
        }
    )


def make_assembly(config: Config, work: Work, vocab_size: int, cache_folder: Path) -> Assembly:
    """A replica on paper whose prompts are given."""
    source = resolve_model(config.base.model, cache_folder=cache_folder)
    lineup = build_lineup(config)
    (plan,) = lineup.hosts
    spec = HostSpec(
        name=plan.name,
        serves=plan.serves,
        source=source,
        dtype="auto",
        device="auto",
        roles=plan.roles,
        num_slots=config.cluster.first_slots,
        vocab_size=vocab_size,
        strict=config.decoding.reproducibility is Reproducibility.STRICT,
        cache_folder=cache_folder,
    )
    prompter = cast(Prompter, GivenPrompts(work.prompts))
    return Assembly(config, lineup, (spec,), {}, prompter, lay_out(config))


def _tokens(chance: random.Random, count: int, vocab_size: int) -> list[int]:
    return [chance.randrange(10, vocab_size) for _ in range(count)]
