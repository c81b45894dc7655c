"""Tokenizers: load one, and make sure that all of a run speak of the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipeline.errors import ConfigurationError
from pipeline.hub.sources import ModelSource
from pipeline.hub.weight_files import LocalTree, read_json

GENERATION_CONFIG = "generation_config.json"
NUM_SHOWN = 5


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a resolved model.

    Raises:
        ConfigurationError: the model's folder has none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigurationError(f"the tokenizer of {source.name} cannot be loaded: {reason_of(error)}") from error


def compare_tokenizers(base: Any, other: Any, base_name: str, other_name: str) -> None:
    """Check that two tokenizers give every id the same token, added and special ones included.

    A model's own embedding may be larger than its tokenizer (padding); that is no difference.

    Raises:
        ConfigurationError: with the number of differing ids and the first few, as both spell them.
    """
    tokens, others = _token_by_id(base), _token_by_id(other)
    both = tokens.keys() & others.keys()
    differing = sorted(token_id for token_id in both if tokens[token_id] != others[token_id])
    only_base, only_other = sorted(tokens.keys() - both), sorted(others.keys() - both)
    faults = []
    if differing:
        shown = ", ".join(f"{i} ({tokens[i]!r} / {others[i]!r})" for i in differing[:NUM_SHOWN])
        faults.append(f"{len(differing):,} of {len(both):,} ids differ: {shown}{_rest(differing)}")
    if only_base:
        faults.append(f"only {base_name} has {_listed(only_base, tokens)}")
    if only_other:
        faults.append(f"only {other_name} has {_listed(only_other, others)}")
    if faults:
        raise ConfigurationError(
            f"{base_name} and {other_name} do not share a vocabulary ({len(tokens):,} and {len(others):,} tokens): "
            f"{'; '.join(faults)}. Principals are paid by token, so every model of a run needs the same tokens"
        )


def stop_token_ids(source: ModelSource, tokenizer: Any, config: Any) -> frozenset[int]:
    """Ids that end an answer: of the generation configuration, the model's configuration and the tokenizer."""
    tree = LocalTree(Path(source.path))
    stated = [tokenizer.eos_token_id, getattr(text_config(config), "eos_token_id", None)]
    if GENERATION_CONFIG in tree.sizes:
        stated.append(read_json(tree, GENERATION_CONFIG).get("eos_token_id"))
    found: set[int] = set()
    for ids in stated:
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return frozenset(found)


def context_length(config: Any) -> int | None:
    """Most tokens that a sequence may have, as the model's configuration states it; None where it states none."""
    length = getattr(text_config(config), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def reason_of(error: Exception) -> str:
    """Why transformers would not read a model, in one line."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    if "trust_remote_code" in message:
        return "it brings Python code of its own; set trust_remote_code: true if you trust that code"
    return message[:300]


def text_config(config: Any) -> Any:
    """The language model's part of a configuration, of a model that also sees or hears."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _token_by_id(tokenizer: Any) -> Mapping[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _listed(ids: list[int], tokens: Mapping[int, str]) -> str:
    noun = "id" if len(ids) == 1 else "ids"
    return f"{len(ids):,} {noun}: " + ", ".join(f"{i} ({tokens[i]!r})" for i in ids[:NUM_SHOWN]) + _rest(ids)


def _rest(ids: list[int]) -> str:
    return ", ..." if len(ids) > NUM_SHOWN else ""
