"""Where bytes live: a local folder or an object store, behind one small protocol.

Both give what the commit protocol needs: a reader never sees half a file, and `create` lets exactly one writer win.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from pipeline.stores.addresses import split_address
from pipeline.stores.local_store import LocalStore, check_folder
from pipeline.stores.object_store import ObjectStore

__all__ = ["LocalStore", "ObjectStore", "Store", "open_store"]


class Store(Protocol):
    """One directory of named byte strings.

    A name is relative, with `/` between its parts; `check_name` says which characters it may have. Every method that
    takes a name raises StorageError for any other, so no name leads out of the directory.

    Every method may be called by several processes at once. What a method wrote is there for all of them when it
    returns, and survives a crash of the machine. `read`, `create` and `put` are retried where a failure may be
    temporary (see `retried`); a failure that stays is a StorageError of one line. A store is plain data: it can be
    pickled, and opens its files or its client where it is used.
    """

    @property
    def path(self) -> str:
        """The address of the directory, as `open_store` accepts it."""

    def read(self, name: str) -> bytes | None:
        """Return the bytes of `name`, all of one write; None when there is no such name."""

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those names that exist, by name; fetched concurrently where that is faster."""

    def open(self, name: str) -> BinaryIO:
        """Open `name` for reading at any position; the caller closes it.

        Raises:
            StorageError: it does not exist, or cannot be read.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` unless it exists; return whether this call wrote it.

        Of several callers at the same time exactly one gets True. Commits depend on this.
        """

    def put(self, name: str, data: bytes) -> None:
        """Write or replace `name` in one step: a reader gets the old bytes or the new ones, never a mixture."""

    def remove(self, name: str) -> None:
        """Remove `name`; nothing happens when it does not exist."""

    def sweep(self) -> None:
        """Remove temporary files that writers left when they were killed; those of live writers are kept."""

    def settle(self) -> None:
        """See that everything that is there stays: a writer may have died before it synced what others have read."""

    def names(self, prefix: str = "") -> list[str]:
        """Return the sorted names that start with `prefix`, those in subfolders included.

        A name that another process writes or removes meanwhile may be listed or not.
        """

    def entries(self) -> list[str]:
        """Return the sorted names of all files and folders at the top, whoever wrote them.

        Left out is what a new folder may have: hidden files, lost+found, an object that stands for the folder.
        """

    def url(self, name: str) -> str:
        """Return the full address of `name`, for messages and for programs that read it by themselves."""


def open_store(path: str) -> Store:
    """Open a directory. Nothing is read or written yet, and the directory need not exist.

    Args:
        path: a local folder, file:///folder, s3://bucket/folder or gs://bucket/folder.

    Raises:
        ConfigurationError: an unknown scheme, no bucket, a file where a folder is expected, or a path that no folder
            can have.
    """
    scheme, address = split_address(path)
    if scheme is not None:
        return ObjectStore(scheme=scheme, root=address)
    folder = Path(address).absolute()  # a later chdir must not move the run
    check_folder(folder)
    return LocalStore(folder)
