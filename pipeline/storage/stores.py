"""Where bytes live: a local folder or an object store, behind one small protocol.

Both give what the commit protocol needs: a reader never sees half a file, and `create` lets exactly one writer win.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from pipeline.errors import ConfigurationError, StorageError

OBJECT_SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
ONE_PUT_BYTES = 2 * 2**30  # below this an object is written by one request
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=-]*(/[A-Za-z0-9_][A-Za-z0-9._=-]*)*")
ASIDE = ".aside"
ABANDONED_AFTER_S = 600.0


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


def file_system(scheme: str) -> Any:
    """The fsspec file system of an object store; credentials and endpoint come from the client's own sources."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs"}.get(scheme, scheme)
        raise ConfigurationError(f"{scheme}:// needs the package {package}: {error}") from None


@contextlib.contextmanager
def told_as_storage_error(action: str) -> Iterator[None]:
    """Turn what a client library raises into one line; FileNotFoundError and FileExistsError pass."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError, ConfigurationError):
        raise
    except Exception as error:  # the object stores' clients share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(f"cannot {action}: {reason}") from error


def check_name(name: str) -> str:
    """Return `name`, or raise ValueError when it could leave the directory."""
    if not NAME.fullmatch(name):
        raise ValueError(f"a stored name has letters, digits and ._=- between slashes; got {name!r}")
    return name


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A folder. Files are written aside, synced and then linked or renamed into place."""

    folder: Path

    @property
    def path(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes | None:
        with told_as_storage_error(f"read {self.url(name)}"):
            try:
                return self._file(name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        found = ((name, self.read(name)) for name in names)
        return {name: data for name, data in found if data is not None}

    def open(self, name: str) -> BinaryIO:
        with told_as_storage_error(f"read {self.url(name)}"):
            try:
                return self._file(name).open("rb")
            except FileNotFoundError:
                raise StorageError(f"{self.url(name)} does not exist") from None

    def create(self, name: str, data: bytes) -> bool:
        file = self._file(name)
        with told_as_storage_error(f"write {file}"), self._aside(file, data) as aside:
            try:
                os.link(aside, file)  # unlike a rename, a link never replaces
            except FileExistsError:
                return False
            _sync_folder(file.parent)
            return True

    def put(self, name: str, data: bytes) -> None:
        file = self._file(name)
        with told_as_storage_error(f"write {file}"), self._aside(file, data) as aside:
            aside.replace(file)
            _sync_folder(file.parent)

    def remove(self, name: str) -> None:
        with told_as_storage_error(f"remove {self.url(name)}"):
            self._file(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        with told_as_storage_error(f"remove old files of {self.folder}"):
            for aside in self.folder.rglob(f".*{ASIDE}"):
                if time.time() - aside.stat().st_mtime > ABANDONED_AFTER_S:
                    aside.unlink(missing_ok=True)

    def names(self, prefix: str = "") -> list[str]:
        start = self.folder / prefix.rpartition("/")[0]
        with told_as_storage_error(f"list {start}"):
            files = (Path(folder) / file for folder, _, files in os.walk(start) for file in files)
            names = (file.relative_to(self.folder).as_posix() for file in files)
            return sorted(name for name in names if name.startswith(prefix) and NAME.fullmatch(name))

    def url(self, name: str) -> str:
        return str(self._file(name))

    def _file(self, name: str) -> Path:
        return self.folder / check_name(name)

    @contextlib.contextmanager
    def _aside(self, file: Path, data: bytes) -> Iterator[Path]:
        """Hold `data`, synced, in a hidden file beside `file`."""
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{file.name}.{secrets.token_hex(6)}{ASIDE}")
        try:
            with aside.open("xb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            yield aside
        finally:
            aside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a new or renamed entry of `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A prefix in a bucket. An object appears whole, by one PUT; nothing is ever renamed.

    `root` is "bucket/folder". The client is made where it is used, so that a store travels to other processes.
    """

    scheme: str
    root: str

    @property
    def path(self) -> str:
        return f"{self.scheme}://{self.root}"

    def read(self, name: str) -> bytes | None:
        with told_as_storage_error(f"read {self.url(name)}"):
            try:
                return cast(bytes, self._files.cat_file(self._key(name)))
            except FileNotFoundError:
                return None

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        name_by_key = {self._key(name): name for name in names}
        if not name_by_key:
            return {}
        with told_as_storage_error(f"read {len(names)} objects of {self.path}"):
            found = self._files.cat(list(name_by_key), on_error="return")
            for answer in found.values():
                if isinstance(answer, Exception) and not isinstance(answer, FileNotFoundError):
                    raise answer
        return {name_by_key[key]: data for key, data in found.items() if isinstance(data, bytes)}

    def open(self, name: str) -> BinaryIO:
        with told_as_storage_error(f"read {self.url(name)}"):
            try:
                return cast(BinaryIO, self._files.open(self._key(name), "rb"))
            except FileNotFoundError:
                raise StorageError(f"{self.url(name)} does not exist") from None

    def create(self, name: str, data: bytes) -> bool:
        for wait_s in (0.1, 0.5, 2.0, None):
            try:
                return self._create_once(name, data)
            except _Conflict:
                if wait_s is None:
                    raise StorageError(f"cannot write {self.url(name)}: it is being written elsewhere") from None
                time.sleep(wait_s)
        raise AssertionError("unreachable")

    def _create_once(self, name: str, data: bytes) -> bool:
        with told_as_storage_error(f"write {self.url(name)}"):
            try:
                self._files.pipe_file(self._key(name), data, mode="create", **self._one_put)
            except FileExistsError:
                return False
            except FileNotFoundError as error:
                raise StorageError(f"cannot write {self.url(name)}: {error}") from error
            except OSError as error:
                status = _http_status(error)
                if status == 412:
                    return False
                if status == 409:
                    raise _Conflict(str(error)) from error
                raise
            return True

    def put(self, name: str, data: bytes) -> None:
        with told_as_storage_error(f"write {self.url(name)}"):
            try:
                self._files.pipe_file(self._key(name), data, **self._one_put)
            except FileNotFoundError as error:
                raise StorageError(f"cannot write {self.url(name)}: {error}") from error

    def remove(self, name: str) -> None:
        with told_as_storage_error(f"remove {self.url(name)}"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._key(name))

    def sweep(self) -> None:
        """Nothing to do: an object appears whole or not at all."""

    def names(self, prefix: str = "") -> list[str]:
        folder, _, start = prefix.rpartition("/")
        under = f"{self.root}/{folder}".rstrip("/")
        with told_as_storage_error(f"list {self.scheme}://{under}"):
            try:
                keys = self._files.find(under, prefix=start) if start else self._files.find(under)
            except FileNotFoundError:
                return []
        names = (str(key).strip("/").removeprefix(f"{self.root}/") for key in keys)
        return sorted(name for name in names if name.startswith(prefix) and NAME.fullmatch(name))

    def url(self, name: str) -> str:
        return f"{self.path}/{check_name(name)}"

    def _key(self, name: str) -> str:
        return f"{self.root}/{check_name(name)}"

    @property
    def _files(self) -> Any:
        return file_system(self.scheme)

    @property
    def _one_put(self) -> dict[str, Any]:
        return {"chunksize": ONE_PUT_BYTES} if self.scheme in ("s3", "gs") else {}


class _Conflict(StorageError):
    """Another conditional write of the same name is in flight."""


def _http_status(error: OSError) -> int | None:
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status is not None else None
