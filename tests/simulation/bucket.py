"""A simulated object store for the real `ObjectStore`, with the methods of fsspec's file systems that it calls."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from simulation.faults import Inject
from simulation.threads import Current

REQUEST_S = 0.03


class Bucket:
    """All objects by key. One request, one object: it is there whole or not at all.

    Args:
        inject: the faults of the schedule.
        changed: called with the key of every object that is written (with its content) or removed (None).
    """

    def __init__(self, inject: Inject, changed: Callable[[str, bytes | None], None]) -> None:
        self.objects: dict[str, bytes] = {}
        self.inject = inject
        self.has_conditions = True  # whether it knows If-None-Match
        self._changed = changed
        self._listed: list[tuple[float, tuple[str, ...]]] = []

    def _request(self, kind: str, key: str, effect: Callable[[], Any]) -> Any:
        """Send a request: it may fail before it takes effect, or after, when its answer is lost."""
        if Current.world.current is None:
            return effect()
        Current.world.pause(REQUEST_S)
        self.inject.storage(kind, key)
        value = effect()
        Current.world.pause(REQUEST_S)
        self.inject.storage("answered", key)
        return value

    def _set(self, key: str, data: bytes | None) -> None:
        self._listed.append((Current.world.now_s, tuple(self.objects)))
        if data is None:
            self.objects.pop(key, None)
        else:
            self.objects[key] = data
        self._changed(key, data)

    def _keys(self) -> tuple[str, ...]:
        """The keys that a listing shows: of now, or of some seconds ago where listings are stale."""
        before_s = Current.world.now_s - self.inject.staleness_s()
        return next((keys for at_s, keys in self._listed if at_s > before_s), tuple(self.objects))

    def cat_file(self, key: str) -> bytes:
        def read() -> bytes:
            if key not in self.objects:
                raise FileNotFoundError(key)
            return self.objects[key]

        return bytes(self._request("read", key, read))

    def cat(self, keys: Sequence[str], on_error: str) -> dict[str, Any]:
        def one(key: str) -> Any:
            return self.objects.get(key, FileNotFoundError(key))

        found: dict[str, Any] = self._request("read", keys[0], lambda: {key: one(key) for key in keys})
        return found

    def open(self, key: str, mode: str) -> io.BytesIO:
        return io.BytesIO(self.cat_file(key))

    def pipe_file(self, key: str, data: bytes, mode: str = "overwrite", chunksize: int = 0) -> None:
        def write() -> None:
            if mode == "create" and key in self.objects and self.has_conditions:
                raise FileExistsError(key)
            self._set(key, data)

        self._request("write", key, write)

    def rm_file(self, key: str) -> None:
        def remove() -> None:
            if key in self.objects:
                self._set(key, None)

        self._request("write", key, remove)

    def find(self, under: str, prefix: str = "") -> list[str]:
        start = f"{under}/{prefix}"
        keys: list[str] = self._request("list", under, lambda: [k for k in self._keys() if k.startswith(start)])
        return sorted(keys)

    def ls(self, root: str, detail: bool) -> list[str]:
        def entries() -> list[str]:
            found = {
                f"{root}/{k.removeprefix(f'{root}/').partition('/')[0]}"
                for k in self._keys()
                if k.startswith(f"{root}/")
            }
            if not found:
                raise FileNotFoundError(root)
            return sorted(found)

        keys: list[str] = self._request("list", root, entries)
        return keys
