"""Addresses and names: what is local, what is in an object store, and what a stored file may be called."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError, StorageError
from pipeline.quoting import one_line, quote

OBJECT_SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=-]*(/[A-Za-z0-9_][A-Za-z0-9._=-]*)*|\.huggingface\.yaml")


def split_address(path: str) -> tuple[str | None, str]:
    """Split an address into its object store's scheme (None for local) and the rest.

    Raises:
        ConfigurationError: an unknown scheme, or a bucket name that no store accepts (so no embedded credentials).
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    if found is None:
        return None, path
    scheme, rest = found[1].lower(), path[found.end() :].strip("/")
    if scheme == "file":
        return None, path[found.end() :]
    if scheme not in OBJECT_SCHEMES:
        raise ConfigurationError(f"{scheme}:// is not supported; use a local path, s3:// or gs://")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}", rest.partition("/")[0]):
        raise ConfigurationError(f"{scheme}:// must be followed by a bucket's name")
    return OBJECT_SCHEMES[scheme], rest


def normal_address(path: str) -> str:
    """The one form of an address: two addresses of the same place are equal in it (links are not followed).

    Raises:
        ConfigurationError: as `split_address`.
    """
    scheme, rest = split_address(path)
    return str(Path(rest).absolute()) if scheme is None else f"{scheme}://{rest}"


def file_system(scheme: str) -> Any:
    """The fsspec file system of an object store; credentials and endpoint come from the client's own sources."""
    import fsspec  # here: a run in a local folder does not need it

    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write to the same folder
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme, scheme)
        raise ConfigurationError(f"{scheme}:// needs the package {package}: {error}") from None


@contextlib.contextmanager
def as_storage_error(action: str) -> Iterator[None]:
    """Raise what a client library raises as a StorageError of one line, "cannot " and `action`.

    FileNotFoundError, FileExistsError and errors that are already of one line pass as they are.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError, ConfigurationError):
        raise
    except Exception as error:  # the object stores' clients share no base class
        raise StorageError(f"cannot {action}: {one_line(error)}") from error


def check_name(name: str) -> str:
    """Return `name`, or raise StorageError when it could leave the directory."""
    if not NAME.fullmatch(name):
        raise StorageError(f"a stored name has letters, digits and ._=- between slashes; got {quote(name)}")
    return name
