"""Random tiny models and a byte-level tokenizer, written to folders as a user's models would be."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

EOS = "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = [EOS, "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
_SHARED = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_tokenizer(
    *, extra: tuple[str, ...] = (), chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Every byte is a token, so that characters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet, *extra])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = chat_template
    return fast


def make_config(kind: str, vocab_size: int, context: int) -> object:
    ids = {"vocab_size": vocab_size, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
    rope = {**_SHARED, **ids, "max_position_embeddings": context}
    grouped = {**rope, "num_key_value_heads": 2}
    match kind:
        case "llama":
            return LlamaConfig(**grouped)
        case "qwen2":
            return Qwen2Config(**grouped)
        case "qwen3":
            return Qwen3Config(**grouped, head_dim=16)
        case "mistral":
            return MistralConfig(**grouped, sliding_window=24)
        case "gemma2":  # its attention has a softcap, which slots cannot serve
            return Gemma2Config(**grouped, head_dim=16)
        case "neox":
            return GPTNeoXConfig(**rope)
        case "gpt2":
            return GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=context, tie_word_embeddings=False, **ids)
    raise ValueError(f"no tiny model of kind {kind}")


def make_model(
    folder: Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    context: int = 512,
    scale: float = 6.0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a random model; `scale` widens its logits so that its choices are clear-cut."""
    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(kind, len(tokenizer), context))
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(scale / head.std() / 8)
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_reward_model(
    folder: Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    context: int = 512,
    num_labels: int = 1,
    pad_id: int | None = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a random sequence classifier whose scores differ by whole points."""
    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(seed)
    config = make_config(kind, len(tokenizer), context)
    config.num_labels = num_labels
    config.pad_token_id = pad_id
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.score.weight.mul_(0.3 / model.score.weight.std())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_pair_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Two letters or digits are one token: a letter more changes the token before it."""
    letters = [chr(code) for code in range(33, 127)]
    merges = [(one, other) for one in letters for other in letters]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL[:4], *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL[:4])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = chat_template
    return fast
