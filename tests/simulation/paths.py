"""`pathlib.Path` and the module `os` on a simulated disk, as far as `LocalStore` uses them."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from typing import Any

from simulation.disk import READ_S, Disk, File, Folder
from simulation.threads import Current


class Path:
    """`pathlib.Path` on a simulated disk, as far as `LocalStore` uses it."""

    __slots__ = ("disk", "text")

    def __init__(self, text: str | Path, disk: Disk | None = None) -> None:
        if isinstance(text, Path):
            self.text, self.disk = text.text, text.disk
        else:
            assert disk is not None
            self.text, self.disk = text, disk

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Path:
        return Path(f"{self.text}/{name}" if name else self.text, self.disk)

    @property
    def name(self) -> str:
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> Path:
        return Path(self.text.rpartition("/")[0] or "/", self.disk)

    @property
    def parents(self) -> list[Path]:
        found = [self.parent]
        while found[-1].text != "/":
            found.append(found[-1].parent)
        return found

    def with_name(self, name: str) -> Path:
        return self.parent / name

    def relative_to(self, other: Path) -> Path:
        return Path(self.text.removeprefix(f"{other.text}/"), self.disk)

    def as_posix(self) -> str:
        return self.text

    def is_dir(self) -> bool:
        try:
            return isinstance(self.disk.find(self.text), Folder)
        except OSError:
            return False

    def exists(self) -> bool:
        try:
            self.disk.find(self.text)
        except OSError:
            return False
        return True

    def read_bytes(self) -> bytes:
        return self.disk.read(self.text)

    def open(self, mode: str) -> Any:
        if mode == "rb":
            return io.BytesIO(self.disk.read(self.text))
        return Handle(self.disk, self.text, self.disk.create(self.text))

    def replace(self, target: Path) -> None:
        self.disk.replace(self.text, target.text)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.disk.unlink(self.text)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        self.disk.make_folder(self.text)

    def stat(self) -> Any:
        node = self.disk.find(self.text)
        assert isinstance(node, File)
        num_links = 1 + self.disk.has_other_name(self.text, node)
        return os.stat_result((0, 0, 0, num_links, 0, 0, len(node.data), 0, node.mtime_s + SERVER_CLOCK_S, 0))

    def rglob(self, pattern: str) -> Iterator[Path]:
        ending = pattern.removeprefix(".*")
        self.disk.io("list", self.text, READ_S)
        for path in list(self.disk.files(self.text)):
            name = path.rpartition("/")[2]
            if name.startswith(".") and name.endswith(ending):
                yield Path(path, self.disk)

    def iterdir(self) -> list[Path]:
        self.disk.io("list", self.text, READ_S)
        node = self.disk.find(self.text)
        if isinstance(node, File):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.text)
        return [self / name for name in node.entries]


SERVER_CLOCK_S = 1_800_000_000.0  # a file server's clock does not jump with the machines'


class Handle:
    """A file that is open for writing."""

    def __init__(self, disk: Disk, path: str, file: File) -> None:
        self._disk, self._path, self._file = disk, path, file
        self._descriptor = disk.open_file(file)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.close(self._descriptor)

    def write(self, data: bytes) -> None:
        self._disk.write(self._path, self._file, data)

    def flush(self) -> None:
        """Written at once."""

    def fileno(self) -> int:
        return self._descriptor


class Os:
    """The module `os` for `LocalStore`."""

    O_RDONLY = os.O_RDONLY

    @staticmethod
    def link(source: Path, target: Path) -> None:
        source.disk.link(source.text, target.text)

    @staticmethod
    def open(path: Path, flags: int) -> int:
        return path.disk.open_node(path.text)

    @staticmethod
    def fsync(descriptor: int) -> None:
        Current.disk.sync(descriptor)

    @staticmethod
    def close(descriptor: int) -> None:
        Current.disk.close(descriptor)

    @staticmethod
    def walk(start: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
        start.disk.io("list", start.text, READ_S)
        try:
            node = start.disk.find(start.text)
        except OSError:
            return
        yield from Os._walk(start, node)

    @staticmethod
    def _walk(path: Path, node: File | Folder) -> Iterator[tuple[Path, list[str], list[str]]]:
        if isinstance(node, File):
            return
        items = list(node.entries.items())
        folders = [name for name, each in items if isinstance(each, Folder)]
        yield path, folders, [name for name, each in items if isinstance(each, File)]
        for name in folders:
            if name in node.entries:
                yield from Os._walk(path / name, node.entries[name])
