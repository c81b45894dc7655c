"""Exact and near duplicates among texts.

For near duplicates, MinHash with locality-sensitive hashing (`datasketch`) proposes earlier texts, and the exact
Jaccard similarity of the two sets of character 5-grams decides. So there are no false positives. At most one in a
hundred pairs at the threshold is missed, and fewer above it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.records import Message

EXACT, NEAR = "filters.duplicates.exact", "filters.duplicates.near"
GRAM = 5
NUM_PERMUTATIONS = 128
RECALL = 0.99


class KeptTexts:
    """The texts kept so far, to find duplicates of them.

    Args:
        exact: whether equal texts (up to white space) are duplicates.
        near: the least similarity of near duplicates; None to ignore them.
    """

    def __init__(self, *, exact: bool, near: float | None) -> None:
        self._exact = exact
        self._near = near
        self._digests: set[bytes] = set()
        self._index: Any = None if near is None else _new_index(near)

    def find(self, text: str, *, context: bytes = b"") -> str | None:
        """The filter that the text fails as a duplicate of a kept one; None when it is new.

        Args:
            text: the text.
            context: an equal text is an exact duplicate only in the same context, such as the digest of a prompt.
        """
        if self._exact and _digest(text, context) in self._digests:
            return EXACT
        if self._near is not None:
            for other in self._index.query(_signature(text)):
                if similarity(text, other) >= self._near:
                    return NEAR
        return None

    def add(self, text: str, *, context: bytes = b"") -> None:
        """Keep a text."""
        if self._exact:
            self._digests.add(_digest(text, context))
        if self._near is not None and text not in self._index:
            self._index.insert(text, _signature(text))


def check_installed() -> None:
    """Raise ConfigurationError when the package that finds near duplicates is not installed."""
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise ConfigurationError(
            "synthesis.filters.duplicates.near needs the package datasketch: "
            "install cage-align with the extra `synthesize`"
        ) from None


def prompt_digest(prompt: Sequence[Message], *, key: bytes = b"") -> bytes:
    """16 bytes that identify a conversation; other bytes for another key."""
    hashed = hashlib.blake2b(digest_size=16, key=key)
    for message in prompt:
        calls = message.get("tool_calls")
        for part in (message["role"], message["content"], *([json.dumps(calls, sort_keys=True)] if calls else [])):
            data = part.encode()
            # with its length first, text cannot move from one part to the next and give the same bytes
            hashed.update(len(data).to_bytes(8, "big") + data)
    return hashed.digest()


def similarity(first: str, second: str) -> float:
    """Jaccard similarity of the sets of character 5-grams, ignoring case and runs of white space."""
    left, right = shingles(first), shingles(second)
    return len(left & right) / len(left | right)


@lru_cache(maxsize=1024)
def shingles(text: str) -> frozenset[str]:
    """The character 5-grams of a text; a shorter text is one shingle itself."""
    plain = _plain(text).casefold()
    return frozenset(_grams(plain)) or frozenset([plain])


def _grams(plain: str) -> Iterator[str]:
    return (plain[start : start + GRAM] for start in range(len(plain) - GRAM + 1))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _digest(text: str, context: bytes) -> bytes:
    return hashlib.blake2b(context + _plain(text).encode(), digest_size=16).digest()


def _new_index(near: float) -> Any:
    from datasketch import MinHashLSH

    return MinHashLSH(num_perm=NUM_PERMUTATIONS, params=bands(near))


def bands(near: float) -> tuple[int, int]:
    """Number and size of the bands of the hash: the longest bands that find a pair at the threshold with
    probability `RECALL`. Longer bands propose fewer wrong pairs, which saves exact comparisons.
    """
    sizes = [size for size in range(1, NUM_PERMUTATIONS // 2 + 1) if _recall(near, size) >= RECALL]
    return NUM_PERMUTATIONS // sizes[-1], sizes[-1]


def _recall(near: float, size: int) -> float:
    return 1 - (1 - near**size) ** (NUM_PERMUTATIONS // size)


@cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(NUM_PERMUTATIONS).permutations


@lru_cache(maxsize=1024)
def _signature(text: str) -> Any:
    from datasketch import MinHash

    signature = MinHash(permutations=_permutations(), num_perm=NUM_PERMUTATIONS, scheme="affine32")
    signature.update_batch(shingle.encode() for shingle in sorted(shingles(text)))
    return signature
