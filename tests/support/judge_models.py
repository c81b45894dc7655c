"""Random reward models for judges, written to folders as a user's would be."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, RobertaConfig

from support import tiny_models


def save_reward_model(folder: Path, kind: str = "llama", *, num_labels: int = 1, context: int = 128) -> Path:
    """Write a random reward model, of BERT's or RoBERTa's kind or one that reads from left to right; its folder."""
    tokenizer = tiny_models.make_tokenizer()
    torch.manual_seed(5)
    if kind in ("bert", "roberta"):
        config = (BertConfig if kind == "bert" else RobertaConfig)(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=context, num_labels=num_labels, pad_token_id=0,
        )  # fmt: skip
        tokenizer.chat_template = None
    else:
        config = tiny_models.make_config(kind, len(tokenizer), context)
        config.num_labels = num_labels
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
