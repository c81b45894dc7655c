"""The folder of a training: its plan, its work in progress, and one finished folder for each adapter.

`NAME/training.json` is part of the folder that takes the adapter's place in one step, so an adapter is finished
exactly if it is there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError, RunMismatch
from pipeline.hub.weight_files import TRAINING_FACTS as FACTS
from pipeline.storage.fingerprint import explain_mismatch
from pipeline.stores.addresses import split_address
from pipeline.stores.store import open_store

PLAN, WORK, REPORT = "_plan.json", "_training", "_report.md"


@dataclass(frozen=True, slots=True)
class TrainingFolder:
    """Where the adapters of one training go. Plain data.

    Args:
        path: a local folder.
    """

    path: Path

    @classmethod
    def at(cls, address: str) -> TrainingFolder:
        """The folder at an address. Raises ConfigurationError where it is not on this machine."""
        scheme, rest = split_address(address)
        if scheme is not None:
            raise ConfigurationError(
                f"output.path must be a local folder, where a training keeps its checkpoints; got {address}; copy "
                "the adapters afterwards"
            )
        return cls(Path(rest).expanduser().absolute())

    def template_time(self) -> datetime | None:
        """The time that chat templates were given when this training began."""
        plan = self._plan()
        stated = None if plan is None else plan["template_time"]
        return None if stated is None else datetime.fromisoformat(stated)

    def begin(self, fingerprint: Mapping[str, Any], template_time: datetime | None) -> None:
        """Begin a training here, or check that the one that is here is the same.

        Raises:
            RunMismatch: it has other settings; the message says which.
            ConfigurationError: the folder holds something else.
        """
        store = open_store(str(self.path))
        if self._plan() is None:
            if others := store.entries():
                raise ConfigurationError(
                    f"output.path: {self.path} holds other files and no training ({', '.join(others[:5])}); choose "
                    "an empty folder"
                )
            stated = {"fingerprint": fingerprint, "template_time": template_time and template_time.isoformat()}
            store.create(PLAN, json.dumps(stated, indent=1).encode() + b"\n")
        plan = self._plan()
        assert plan is not None
        if difference := explain_mismatch(plan["fingerprint"], json.loads(json.dumps(fingerprint))):
            raise RunMismatch(
                f"{self.path} holds a training with other settings (stored -> given):\n{difference}\n"
                "Restore these settings to continue it, or choose another output.path."
            )

    def facts(self, name: str) -> dict[str, Any] | None:
        """What is stated beside a finished adapter; None where it is not finished."""
        file = self.path / name / FACTS
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def work(self, name: str) -> Path:
        """Where checkpoints of an adapter are kept until it is finished."""
        return self.path / WORK / name

    def finish(self, name: str, prepared: Path, facts: Mapping[str, Any]) -> None:
        """Put a prepared folder in the place of an adapter in one step, and remove its work."""
        text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
        (prepared / FACTS).write_text(text + "\n", encoding="utf-8")
        target = self.path / name
        if target.exists():
            shutil.rmtree(target)
        prepared.replace(target)
        shutil.rmtree(self.work(name), ignore_errors=True)

    def write_report(self, text: str) -> None:
        """Write or replace the report."""
        open_store(str(self.path)).put(REPORT, text.encode())

    def _plan(self) -> dict[str, Any] | None:
        text = open_store(str(self.path)).read(PLAN)
        if text is None:
            return None
        try:
            plan: dict[str, Any] = json.loads(text)
            plan["fingerprint"].items(), plan["template_time"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigurationError(
                f"output.path: {self.path} holds something else than a training, as a run; choose an empty folder"
            ) from None
        return plan
