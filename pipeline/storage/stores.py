"""Where bytes live: a local folder or an object store, behind one small protocol.

Both give what the commit protocol needs: a reader never sees half a file, and `create` lets exactly one writer win.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.errors import ConfigurationError
from pipeline.storage.addresses import split_address
from pipeline.storage.local_store import LocalStore
from pipeline.storage.object_store import ObjectStore

__all__ = ["LocalStore", "ObjectStore", "Store", "open_store"]


class Store(Protocol):
    """One directory of named byte strings. A name is relative, with `/` between its parts."""

    @property
    def path(self) -> str:
        """The address of the directory, as `open_store` accepts it."""

    def read(self, name: str) -> bytes | None:
        """Return the bytes of `name`, or None when there is no such name."""

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those names that exist, fetched at once where that is faster."""

    def open(self, name: str) -> BinaryIO:
        """Open `name` for reading at any position. Raises StorageError when it does not exist."""

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; return whether this call wrote it."""

    def put(self, name: str, data: bytes) -> None:
        """Write or replace `name` in one step."""

    def remove(self, name: str) -> None:
        """Remove `name` if it exists."""

    def sweep(self) -> None:
        """Remove what writers that were killed long ago left half-written."""

    def names(self, prefix: str = "") -> list[str]:
        """Return the sorted names that start with `prefix`; folders are searched too."""

    def url(self, name: str) -> str:
        """The full address of `name`."""


def open_store(path: str) -> Store:
    """Open a directory: a local folder, s3://bucket/folder or gs://bucket/folder. Nothing is written yet.

    Raises:
        ConfigurationError: an unknown scheme, no bucket, or a file where a folder is expected.
    """
    scheme, address = split_address(path)
    if scheme is not None:
        return ObjectStore(scheme=scheme, root=address)
    folder = Path(address).absolute()
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{path} is a file; a folder is needed")
    return LocalStore(folder)
