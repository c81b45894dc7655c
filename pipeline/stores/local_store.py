"""A local (or network) folder as a store."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ConfigurationError, StorageError
from pipeline.quoting import quote
from pipeline.stores.addresses import NAME, as_storage_error, check_name
from pipeline.stores.retries import retried

TEMPORARY_SUFFIX = ".tmp"
ABANDONED_AFTER_S = 600.0  # no write takes so long: an older temporary file has lost its writer

_durable_folders: set[Path] = set()  # of which this process knows that they survive a power cut


@dataclass(frozen=True, slots=True)
class LocalStore:
    """A local or network folder (see `Store` for what the methods promise).

    A file is first written under a hidden temporary name, synced, and then linked or renamed to its own name, so that
    a reader never sees half of it. `create` needs hard links and raises StorageError on a file system without them.

    Args:
        folder: an absolute path. It is made at the first write.
    """

    folder: Path

    @property
    def path(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes | None:
        file = self._file(name)

        def read_once() -> bytes | None:
            try:
                return file.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

        return retried(f"read {file}", read_once)

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        found = ((name, self.read(name)) for name in names)
        return {name: data for name, data in found if data is not None}

    def open(self, name: str) -> BinaryIO:
        with as_storage_error(f"read {self.url(name)}"):
            try:
                return self._file(name).open("rb")
            except FileNotFoundError:
                raise StorageError(f"{self.url(name)} does not exist") from None

    def create(self, name: str, data: bytes) -> bool:
        file = self._file(name)
        return retried(f"write {file}", lambda: self._create_once(file, data))

    def _create_once(self, file: Path, data: bytes) -> bool:
        with self._temporary(file, data) as temporary:
            try:
                # A rename would replace the file of another writer. A link fails if the name exists, in one step:
                # exactly one of several writers wins.
                os.link(temporary, file)
            except FileExistsError:
                # NFS sends a request again whose reply was lost, and then finds the link that the first one made
                if temporary.stat().st_nlink == 1:
                    # the caller goes on with the file that is there; its writer may have died before it synced
                    _sync_folder(file.parent)
                    return False
            except OSError as error:
                if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise StorageError(
                        f"cannot write {file}: its file system has no hard links, which commits need"
                    ) from None
                raise
            _sync_folder(file.parent)  # before True: the caller goes on to write what refers to this file
            return True

    def put(self, name: str, data: bytes) -> None:
        file = self._file(name)
        retried(f"write {file}", lambda: self._put_once(file, data))

    def _put_once(self, file: Path, data: bytes) -> None:
        with self._temporary(file, data) as temporary:
            temporary.replace(file)
            _sync_folder(file.parent)

    def remove(self, name: str) -> None:
        with as_storage_error(f"remove {self.url(name)}"):
            self._file(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        with as_storage_error(f"remove old files of {self.folder}"):
            for temporary in self.folder.rglob(f".*{TEMPORARY_SUFFIX}"):
                # another driver may end its write between the listing and here
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - temporary.stat().st_mtime > ABANDONED_AFTER_S:
                        temporary.unlink()

    def settle(self) -> None:
        # a file's content is synced before it has its name
        retried(f"write {self.folder}", self._settle_once)

    def _settle_once(self) -> None:
        for folder, _, _ in os.walk(self.folder):
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                _sync_folder(Path(folder))

    def names(self, prefix: str = "") -> list[str]:
        start = self.folder / prefix.rpartition("/")[0]
        with as_storage_error(f"list {start}"):
            files = (Path(folder) / file for folder, _, files in os.walk(start) for file in files)
            names = (file.relative_to(self.folder).as_posix() for file in files)
            return sorted(name for name in names if name.startswith(prefix) and NAME.fullmatch(name))

    def entries(self) -> list[str]:
        with as_storage_error(f"list {self.folder}"):
            try:
                names = [entry.name for entry in self.folder.iterdir()]
            except FileNotFoundError:
                return []
        return sorted(name for name in names if not name.startswith(".") and name != "lost+found")

    def url(self, name: str) -> str:
        return str(self._file(name))

    def _file(self, name: str) -> Path:
        return self.folder / check_name(name)

    @contextlib.contextmanager
    def _temporary(self, file: Path, data: bytes) -> Iterator[Path]:
        """Yield a hidden file beside `file` that holds `data`; remove it at the end.

        The data is synced before the file gets its name. In the other order a power cut could leave the name with
        no or half the data, and a commit record would vouch for it. The file lies in the same folder because links
        and renames do not cross file systems.
        """
        if file.parent not in _durable_folders or not file.parent.is_dir():
            _make_folder(file.parent)
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
        try:
            with temporary.open("xb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            try:
                yield temporary
            except FileNotFoundError as error:
                # swept away by a machine whose clock is ahead, or with its folder: another try writes it again
                raise OSError(errno.ESTALE, f"{temporary} was removed while it was written") from error
        finally:
            temporary.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Raise ConfigurationError where a path is no folder and cannot become one.

    Args:
        folder: an absolute path.
    """
    try:
        for place in (folder, *folder.parents):
            if place.is_dir():
                return
            if place.exists():
                within = "" if place == folder else f", so it cannot hold {quote(str(folder.relative_to(place)))}"
                raise ConfigurationError(f"{place} is a file; a folder is needed{within}")
            if place.is_symlink():
                raise ConfigurationError(f"{place} is a link to {quote(str(place.readlink()))}, which does not exist")
    except OSError as error:  # a name that is too long, a loop of links, a folder that may not be looked into
        reason = error.strerror or type(error).__name__
        raise ConfigurationError(f"no folder can be at {quote(str(folder))}: {reason.lower()}") from None


def _make_folder(folder: Path) -> None:
    """Make a folder, and see that it survives a power cut.

    The entries of all folders above it are synced. Another process may have made some of them and been killed
    before it synced their names.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigurationError(f"cannot write to {folder}: it is not a folder") from None
    except FileNotFoundError:  # /proc says so; for the callers it means that a file has not been written yet
        raise ConfigurationError(f"cannot make the folder {folder}: its file system takes no new folders") from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise
        reason = (error.strerror or "").lower()
        raise ConfigurationError(f"cannot make the folder {folder}: {reason}") from None
    for place in reversed(folder.parents):
        with contextlib.suppress(PermissionError):  # one that may not be looked into is not of this process's making
            _sync_folder(place)
    _durable_folders.add(folder)


def _sync_folder(folder: Path) -> None:
    """Make a new or renamed entry of `folder` survive a power cut: syncing a file does not sync its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
