"""Tiny models whose sizes can be divided by two and by three, and hosts of real ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.engine.engine import decode_rows
from pipeline.protocol.hosts import Hosts
from pipeline.records import Record, Row
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.engines import make_engine
from support.tiny_models import make_tokenizer

SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}


def make_divisible(folder: Path, *, seed: int = 0, num_kv_heads: int = 6) -> Path:
    """Write a random llama with six heads."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SIZES, num_key_value_heads=num_kv_heads, vocab_size=len(tokenizer), max_position_embeddings=512,
        eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(0.75 / head.std())
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def decode_with(assembly: Assembly, hosts: Hosts, rows: Iterable[Row], slots: int) -> dict[str, Record]:
    """Records by row id, with loaded hosts and another number of slots."""
    for client in hosts.all:
        client.resize(slots).result()
    cluster = assembly.config.cluster.model_copy(update={"slots": slots})
    assembly = replace(assembly, config=assembly.config.model_copy(update={"cluster": cluster}))
    return {record.row_id: record for record in decode_rows(make_engine(assembly, hosts), rows)}


def tokens_of(records: dict[str, Record]) -> dict[str, list[int]]:
    return {name: [token.token_id for token in record.tokens] for name, record in records.items()}


def numbers_of(records: dict[str, Record]) -> list[Any]:
    return [
        number
        for name in sorted(records)
        for token in records[name].tokens
        for number in (token.base_logprob, token.logprob, *token.payments.values())
    ]
