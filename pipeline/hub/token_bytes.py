"""The bytes that each token of a vocabulary stands for, and the tokens that begin with given bytes."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import ConfigurationError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # what SentencePiece writes for a space


def token_bytes(tokenizer: Any, name: str) -> list[bytes | None]:
    """The bytes of every token by its id; None for special tokens and ids without a token.

    Args:
        tokenizer: of transformers.
        name: of its model, for messages.

    Raises:
        ConfigurationError: its tokens are neither bytes (as GPT-2 writes them) nor pieces of text (SentencePiece).
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
    parts = _decoder_parts(tokenizer)
    if "ByteLevel" in parts:
        byte_of = _byte_of_letter()
    elif parts & {"ByteFallback", "Metaspace", "Replace"}:
        byte_of = None
    else:
        raise ConfigurationError(
            f"the tokens of {name} are neither bytes nor SentencePiece's pieces of text, so it cannot be read beside "
            "a base with other tokens"
        )
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id in added:
            found[token_id] = None if added[token_id].special else added[token_id].content.encode()
        else:
            found[token_id] = _piece(token) if byte_of is None else _letters(token, byte_of)
    return found


@dataclass(frozen=True, slots=True)
class ByteIndex:
    """Finds the tokens whose bytes begin with given bytes.

    Args:
        ids: of all tokens with bytes, sorted by these.
        keys: the bytes, in that order.
        by_id: the bytes of every token; None for special ones.
        one_byte: the tokens that are a single byte.
    """

    ids: tuple[int, ...]
    keys: tuple[bytes, ...]
    by_id: Sequence[bytes | None]
    one_byte: Mapping[bytes, int] = field(default_factory=dict)

    @classmethod
    def of(cls, by_id: Sequence[bytes | None], vocab_size: int) -> ByteIndex:
        """The index of a vocabulary, without the tokens that a model has no output for."""
        found = sorted((key, token_id) for token_id, key in enumerate(by_id[:vocab_size]) if key)
        one_byte = {key: token_id for key, token_id in reversed(found) if len(key) == 1}
        return cls(tuple(token_id for _, token_id in found), tuple(key for key, _ in found), by_id, one_byte)

    def beginning_with(self, start: bytes) -> tuple[int, int]:
        """The tokens that begin with `start`, as the bounds of a part of `ids`."""
        first = bisect_left(self.keys, start)
        after = _successor(start)
        return first, len(self.keys) if after is None else bisect_left(self.keys, after)


def _successor(start: bytes) -> bytes | None:
    """The least bytes that are larger than all that begin with `start`; None where there are none."""
    trimmed = start.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else None


def _decoder_parts(tokenizer: Any) -> set[str]:
    """The names of the steps in which a tokenizer decodes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str()).get("decoder")
    if not decoder:
        return set()
    parts = decoder.get("decoders", [decoder])
    return {
        each["type"]
        for each in parts
        if each["type"] != "Replace" or SPACE in str(each.get("pattern"))  # other replacements are no pieces
    }


def _byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level token stands for: printable ones for themselves, others shifted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _letters(token: str, byte_of: dict[str, int]) -> bytes | None:
    try:
        return bytes(byte_of[letter] for letter in token)
    except KeyError:
        return None


def _piece(token: str) -> bytes:
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(SPACE, " ").encode()
