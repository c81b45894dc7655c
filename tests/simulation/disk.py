"""A simulated file system for the real `LocalStore`: what is not synced is lost when the power is cut.

A file has the content that readers see and the one that survives. A folder has its entries, and a log of the changes
to them that are not synced: after a power cut the first few of these are there, as a journal would have them, and the
others are not. How many, and how much of a file's unsynced content, the seed decides.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator

from simulation.faults import Inject
from simulation.threads import Current

READ_S, WRITE_S, SYNC_S, ENTRY_S = 0.001, 0.002, 0.004, 0.001


@functools.lru_cache(maxsize=1024)
def _parts(path: str) -> tuple[str, ...]:
    """The names that lead to a path."""
    return tuple(part for part in path.split("/") if part)


class File:
    """A file: what is in it, and what of that survives."""

    __slots__ = ("data", "mtime_s", "synced")

    def __init__(self) -> None:
        self.data = b""
        self.synced: bytes | None = None
        self.mtime_s = 0.0


class Folder:
    """A folder: its entries, those that survive, and the changes in between."""

    __slots__ = ("entries", "log", "synced")

    def __init__(self) -> None:
        self.entries: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}
        self.log: list[tuple[str, File | Folder | None]] = []

    def set(self, name: str, node: File | Folder | None) -> None:
        if node is None:
            del self.entries[name]
        else:
            self.entries[name] = node
        self.log.append((name, node))

    def sync(self) -> None:
        self.synced = dict(self.entries)
        self.log.clear()


class Disk:
    """A disk, or a file server: it outlives every process.

    Args:
        inject: the faults of the schedule.
        changed: called with the path of every file that appears, is replaced (with its new content) or goes (None).
    """

    def __init__(self, inject: Inject, changed: Callable[[str, bytes | None], None]) -> None:
        self.root = Folder()
        self._make_existing("/mnt/data")
        self.inject = inject
        self.has_links = True
        self.is_exclusive = True  # whether a link fails where its name is taken
        self._changed = changed
        self._open: dict[int, Folder | File] = {}
        self._num_opened = 1000

    def _make_existing(self, path: str) -> None:
        """A folder that was there before."""
        node = self.root
        for part in path.split("/")[1:]:
            node.set(part, found := Folder())
            node.sync()
            node = found

    # nodes

    def find(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for part in _parts(path):
            if isinstance(node, File):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            found = node.entries.get(part)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            node = found
        return node

    def folder_of(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        node = self.find(parent or "/")
        if isinstance(node, File):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return node, name

    def bytes_of(self, path: str) -> bytes | None:
        """A file's content as readers see it; without taking time."""
        try:
            node = self.find(path)
        except OSError:
            return None
        return node.data if isinstance(node, File) else None

    def files(self, path: str) -> dict[str, bytes]:
        """The content of all files below a folder by their paths; without taking time."""
        try:
            node = self.find(path)
        except OSError:
            return {}
        return {where: file.data for where, file in self._below(node, path)}

    def has_other_name(self, path: str, node: File) -> bool:
        """Whether a file has another name than this hidden one: that for which it is temporary."""
        folder, name = self.folder_of(path)
        return any(each is node for other, each in folder.entries.items() if other != name)

    def _below(self, node: File | Folder, path: str) -> Iterator[tuple[str, File]]:
        if isinstance(node, File):
            yield path, node
            return
        for name, each in node.entries.items():
            yield from self._below(each, f"{path.rstrip('/')}/{name}")

    # operations: each takes time, and may fail

    def io(self, kind: str, path: str, seconds: float) -> None:
        """An operation is about to take effect: time passes, and a fault may occur."""
        if Current.world.current is not None:
            Current.world.pause(seconds)
            self.inject.storage(kind, path)

    def settle(self, seconds: float) -> None:
        """An operation took effect and its caller has not noticed yet."""
        if Current.world.current is not None:
            Current.world.pause(seconds)

    def read(self, path: str) -> bytes:
        self.io("read", path, READ_S)
        node = self.find(path)
        if isinstance(node, Folder):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node.data

    def create(self, path: str) -> File:
        self.io("write", path, ENTRY_S)
        folder, name = self.folder_of(path)
        if name in folder.entries:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        file = File()
        file.mtime_s = Current.world.now_s
        folder.set(name, file)
        self._tell(path)
        return file

    def write(self, path: str, file: File, data: bytes) -> None:
        """The bytes reach the page cache in two pieces; a writer may be killed between them."""
        half = len(data) // 2
        file.data += data[:half]
        self.io("write", path, WRITE_S)
        file.data += data[half:]
        file.mtime_s = Current.world.now_s
        self._tell(path)

    def link(self, source: str, path: str) -> None:
        self.io("entry", path, ENTRY_S)
        if not self.has_links:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
        node = self.find(source)
        folder, name = self.folder_of(path)
        if name in folder.entries and self.is_exclusive:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        folder.set(name, node)
        self._tell(path)
        self.settle(ENTRY_S)
        self.inject.storage("linked", path)

    def replace(self, source: str, path: str) -> None:
        self.io("entry", path, ENTRY_S)
        node = self.find(source)
        folder, name = self.folder_of(path)
        before, own = self.folder_of(source)
        before.set(own, None)
        folder.set(name, node)
        self._tell(path)
        self.settle(ENTRY_S)

    def unlink(self, path: str) -> None:
        self.io("entry", path, ENTRY_S)
        folder, name = self.folder_of(path)
        if name not in folder.entries:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        folder.set(name, None)
        self._tell(path)

    def make_folder(self, path: str) -> None:
        self.io("entry", path, ENTRY_S)
        node = self.root
        for part in path.split("/")[1:]:
            found = node.entries.get(part)
            if found is None:
                found = Folder()
                node.set(part, found)
            if isinstance(found, File):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            node = found

    def open_node(self, path: str) -> int:
        self._num_opened += 1
        self._open[self._num_opened] = self.find(path)
        return self._num_opened

    def open_file(self, file: File) -> int:
        self._num_opened += 1
        self._open[self._num_opened] = file
        return self._num_opened

    def sync(self, descriptor: int) -> None:
        self.io("sync", "", SYNC_S)
        node = self._open[descriptor]
        if isinstance(node, Folder):
            node.sync()
        else:
            node.synced = node.data
        self.settle(SYNC_S)

    def close(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)

    def _tell(self, path: str) -> None:
        if not path.rpartition("/")[2].startswith(".") or path.endswith(".huggingface.yaml"):
            self._changed(path, self.bytes_of(path))

    # power

    def cut_power(self) -> None:
        """Lose what is not synced."""
        self._lose(self.root, "/")

    def _lose(self, folder: Folder, path: str) -> None:
        unit = Current.world.unit
        num_kept = int(unit(f"{path} log") * (len(folder.log) + 1))
        entries = dict(folder.synced)
        for name, node in folder.log[:num_kept]:
            if node is None:
                entries.pop(name, None)
            else:
                entries[name] = node
        folder.entries = entries
        folder.sync()
        for name, node in entries.items():
            if isinstance(node, Folder):
                self._lose(node, f"{path}{name}/")
            elif node.synced != node.data:
                data = node.data if node.synced is None else node.synced
                node.data = data[: int(unit(f"{path}{name}") * len(data))]
                node.synced = node.data
