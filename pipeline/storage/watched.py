"""A store whose writes are watched at the named points of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from pipeline.points import Point, Watcher, unwatched
from pipeline.storage.run import MANIFEST, Run
from pipeline.storage.shard_files import COMMITS
from pipeline.storage.stores import Store


@dataclass(frozen=True, slots=True)
class WatchedStore:
    """Passes everything on to `store` and tells `watch` what is about to be written, or was."""

    store: Store
    watch: Watcher

    @property
    def path(self) -> str:
        return self.store.path

    def read(self, name: str) -> bytes | None:
        return self.store.read(name)

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        return self.store.read_many(names)

    def open(self, name: str) -> BinaryIO:
        return self.store.open(name)

    def create(self, name: str, data: bytes) -> bool:
        is_data = name.startswith("part-")
        if is_data:
            self.watch(Point.BEFORE_DATA, name)
        created = self.store.create(name, data)
        if is_data:
            self.watch(Point.AFTER_DATA, name)
        elif name.startswith(COMMITS):
            self.watch(Point.AFTER_COMMIT, name)
        return created

    def put(self, name: str, data: bytes) -> None:
        if name == MANIFEST:
            self.watch(Point.BEFORE_MANIFEST, name)
        self.store.put(name, data)

    def remove(self, name: str) -> None:
        self.store.remove(name)

    def sweep(self) -> None:
        self.store.sweep()

    def names(self, prefix: str = "") -> list[str]:
        return self.store.names(prefix)

    def url(self, name: str) -> str:
        return self.store.url(name)


def watched(run: Run, watch: Watcher) -> Run:
    """The run with its writes watched; the run itself where nothing watches."""
    return run if watch is unwatched else replace(run, store=WatchedStore(run.store, watch))
