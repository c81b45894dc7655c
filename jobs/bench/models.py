"""What the decoding benchmarks decode: models of a named shape, prompts and answers of given lengths."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.files import parse_config
from pipeline.config.sections import Config, Reproducibility
from pipeline.config.variants import lay_out
from pipeline.engine.prompter import NOTHING
from pipeline.hub.sources import resolve_adapter, resolve_model
from pipeline.hub.weight_files import ADAPTER_WEIGHTS
from pipeline.protocol.specs import GameSpec, HostSpec
from pipeline.records import Message, Row, Tool
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.topology import build_topology
from pipeline.worker.adapters import without_peft_warnings
from pipeline.worker.devices import pick_device, pick_dtype

# Llama architectures, and a mixture of experts that chooses 2 of 16; the names say how many parameters they have.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
           "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "180M-MoE": {"model_type": "qwen3_moe", "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 12,
                 "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32_000,
                 "tie_word_embeddings": True, "num_experts": 16, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 512},
    "7B": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32_000, "tie_word_embeddings": False},
}  # fmt: skip
SURE, FAINT = 3.0, 0.1  # times ordinary random weights: of a head, and of what later layers add
PRINCIPLE_TOKENS = 24
ADAPTER_RANK = 16


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
    """A `Prompter` whose token ids are given; no token ends an answer.

    Args:
        prompts: token ids by role, one mapping per row; a row's text is the number of its mapping.
    """

    def __init__(self, prompts: Sequence[Mapping[str, Sequence[int]]]) -> None:
        self._prompts = prompts

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset()

    def encode(
        self,
        messages: Sequence[Message],
        weights: Mapping[str, float],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] = NOTHING,
    ) -> Mapping[str, Sequence[int]]:
        return self._prompts[int(messages[0]["content"])]

    def shared_prefixes(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> dict[str, int]:
        return {role: PRINCIPLE_TOKENS if role.startswith("p") else 0 for role in prompts}

    def context_left(self, prompts: Mapping[str, Sequence[int]]) -> None:
        return None

    def encode_answer(self, text: str) -> list[int]:
        return [int(token) for token in text.split()]

    def kwargs_of(self, row: Row) -> Mapping[str, Any]:
        return NOTHING

    def encode_existing(self, row: Row, prompts: Mapping[str, Sequence[int]]) -> tuple[list[int], int]:
        return self.encode_answer(row.response or ""), 0

    def without_reasoning(self, text: str) -> str:
        return text

    def begin_turn(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> None:
        return None

    def raw_text(self, ids: Sequence[int]) -> str:
        return self.decode(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def left_out(self, ids: Sequence[int]) -> str:
        return ""

    def token_text(self, token_id: int) -> str:
        return str(token_id)


def save_random_model(shape: str, folder: Path, *, num_telling: int | None = None) -> Path:
    """Write a model of this shape with random weights.

    Args:
        shape: one of SHAPES.
        folder: to write to.
        num_telling: so many first layers are to tell most of what the model draws, with a head that makes it sure of
            its tokens; None: all layers count alike, and all tokens are about as likely.

    Raises:
        KeyError: the shape is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"model_type": "llama", "max_position_embeddings": 8192, **SHAPES[shape]}
    if num_telling is not None:  # a head that is sure and reads embeddings draws every token again and again
        settings["tie_word_embeddings"] = False
    device = pick_device("auto")
    torch.manual_seed(0)
    torch.set_default_dtype(pick_dtype("auto", device))
    try:
        with device:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    finally:
        torch.set_default_dtype(torch.float32)
    if num_telling is not None:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(SURE)
            for layer in model.model.layers[num_telling:]:
                for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    projection.weight.mul_(FAINT)
    model.save_pretrained(folder)
    return folder


def save_random_adapters(model: Path, folder: Path, count: int) -> list[str]:
    """Write LoRA adapters of all linear layers of a model, with random weights."""
    import peft
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), without_peft_warnings():
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        config = peft.LoraConfig(r=ADAPTER_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        shapes = peft.get_peft_model_state_dict(peft.get_peft_model(bare, config))
    config.base_model_name_or_path = str(model)
    folders = []
    for at in range(count):
        generator = torch.Generator().manual_seed(at)
        place = folder / f"adapter{at}"
        config.save_pretrained(place)
        weights = {name: torch.randn(meta.shape, generator=generator) * 0.01 for name, meta in shapes.items()}
        save_file(weights, place / ADAPTER_WEIGHTS)
        folders.append(str(place))
    return folders


def make_work(
    roles: Sequence[str], *, num_rows: int, vocab_size: int, mean_length: int, max_length: int, seed: int = 0
) -> Work:
    """Prompts of 16 to 64 tokens; answers of geometric lengths, cut at `max_length`. The prompt of p0, p1, ...
    is a principle, the same for every row, and the row's prompt."""
    chance = random.Random(seed)
    principles = {role: _tokens(chance, PRINCIPLE_TOKENS, vocab_size) for role in roles if role.startswith("p")}
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
    model: str,
    *,
    num_principals: int,
    adapters: Sequence[str] = (),
    slots: int,
    max_length: int,
    strict: bool,
    candidates: int | str,
    tensor_parallel: int = 1,
) -> Config:
    """Prompted principals and adapters on one base: as many roles of one set of weights, and the base."""
    weight = 1 / max(num_principals + len(adapters), 1)
    prompted = {f"p{at}": {"kind": "prompted", "principle": f"p{at}"} for at in range(num_principals)}
    adapted = {f"a{at}": {"kind": "arm", "adapter": folder} for at, folder in enumerate(adapters)}
    return parse_config(
        {
            "input": {"path": "none"},
            "output": {"path": "none"},
            "base": {"model": model, "tensor_parallel": tensor_parallel},
            "principals": {name: {**each, "weight": weight} for name, each in (prompted | adapted).items()},
            "decoding": {
                "max_new_tokens": max_length,
                "candidates": candidates,
                "agent_temperature": 1.0,
                "trace": "summary",
                "draft": "off",
                "reproducibility": str(Reproducibility.STRICT if strict else Reproducibility.RELAXED),
            },
            "cluster": {"slots": slots},
        }
    )


def make_assembly(
    config: Config, work: Work, vocab_size: int, cache_folder: Path, *, attention: str = "auto"
) -> Assembly:
    """A replica on paper whose prompts are given; `attention` is that of a model section."""
    source = resolve_model(config.base.model, cache_folder=cache_folder)
    topology = build_topology(config)
    (plan,) = topology.hosts
    variants = lay_out(config)
    rules = frozenset(variant.rule for variant in variants)
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
        adapters={name: resolve_adapter(folder, cache_folder=cache_folder) for name, folder in plan.adapters.items()},
        games=GameSpec(config.decoding.sampling, topology.principals, rules),
        attention=attention,
        tensor_parallel=config.base.tensor_parallel,
    )
    return Assembly(config, topology, (spec,), {}, GivenPrompts(work.prompts), variants)


def _tokens(chance: random.Random, count: int, vocab_size: int) -> list[int]:
    return [chance.randrange(10, vocab_size) for _ in range(count)]
