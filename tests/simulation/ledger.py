"""What must hold at every moment: no commit without data, nothing committed is ever changed, the end comes last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from simulation.threads import Current


class Ledger:
    """Watches every change of the run's files.

    Args:
        read: the content of a file of the run as readers see it, by its name; None where there is none.
        num_shards: in the plan.
    """

    def __init__(self, read: Callable[[str], bytes | None], num_shards: int) -> None:
        self._read = read
        self._num_shards = num_shards
        self._locked: dict[str, str] = {}  # committed files, with their hashes
        self.commits: dict[str, dict[str, Any]] = {}
        self.acknowledged: set[str] = set()  # commit records that a driver was told of
        self.is_watching = True

    def changed(self, name: str, data: bytes | None) -> None:
        """A file of the run appeared, was replaced or went."""
        if not self.is_watching:
            return
        if name in self._locked:
            how = "removed" if data is None else "written again"
            Current.world.violate(f"{name} is committed and was {how}")
        elif data is None:
            pass
        elif name.startswith("_commits/"):
            self._committed(name, data)
        elif name in ("_manifest.json", "_SUCCESS") and len(self.commits) < self._num_shards:
            Current.world.violate(f"{name} was written when {len(self.commits)} of {self._num_shards} were committed")

    def _committed(self, name: str, data: bytes) -> None:
        try:
            record = json.loads(data)
        except ValueError:
            Current.world.violate(f"{name} is there in part")
            return
        self.commits[name] = record
        self._locked[name] = hashlib.sha256(data).hexdigest()
        for file, digest in record["sha256_by_file"].items():
            self._locked[file] = digest
        self._check(name)

    def _check(self, name: str) -> None:
        """Whether the files of a commit record are there as it says."""
        for file, digest in self.commits[name]["sha256_by_file"].items():
            found = self._read(file)
            if found is None:
                Current.world.violate(f"{name} is there without {file}")
            elif hashlib.sha256(found).hexdigest() != digest:
                Current.world.violate(f"{name} is there with another {file}")

    def power_was_cut(self) -> None:
        """Look at what survived."""
        for name in self.acknowledged:
            if self._read(name) is None:
                Current.world.violate(f"{name} was acknowledged and is lost")
        before, locked = dict(self.commits), dict(self._locked)
        self.commits.clear()
        self._locked.clear()
        for name in before:
            data = self._read(name)
            if data is None:
                continue  # it was there for a moment, and nobody was told
            if hashlib.sha256(data).hexdigest() == locked[name]:
                self._committed(name, data)
            else:
                Current.world.violate(f"{name} is damaged")
