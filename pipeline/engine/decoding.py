"""What decodes rows, whatever its games are about."""

from __future__ import annotations

from typing import Protocol

from pipeline.errors import HostError
from pipeline.monitoring.counts import Recoveries, Work
from pipeline.monitoring.metrics import Load
from pipeline.protocol.hosts import Hosts
from pipeline.records import Record, Row


class DecodingEngine(Protocol):
    """`Engine`, or `ChoiceEngine` around one; each method is described there."""

    @property
    def num_slots(self) -> int: ...

    @property
    def num_steps(self) -> int: ...

    @property
    def recoveries(self) -> Recoveries: ...

    @property
    def work(self) -> Work: ...

    @property
    def load(self) -> Load: ...

    @property
    def wants_row(self) -> bool: ...

    @property
    def is_idle(self) -> bool: ...

    def resize(self) -> None: ...

    def admit(self, row: Row, variant: int = 0, sample: int = 0) -> None: ...

    def score(self, row: Row) -> dict[str, float]: ...

    def step(self) -> list[Record]: ...

    def recover(self, hosts: Hosts, error: HostError) -> None: ...
