"""What the process of a host tells the progress board about itself."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar, cast

from pipeline.monitoring.host_meter import HostMeter

MethodT = TypeVar("MethodT", bound=Callable[..., Any])

REPORT_S = 2.0


def measured(method: MethodT) -> MethodT:
    """Have the `meter` of the method's object measure each call, once there is one."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.meter is None:
            return method(self, *args, **kwargs)
        with self.meter.calling():
            return method(self, *args, **kwargs)

    return cast(MethodT, call)


@dataclass(frozen=True, slots=True)
class HostReports:
    """Where a host reports.

    Args:
        board: the progress board, an actor handle.
        replica: the number of its replica.
        host: its name in the topology.
    """

    board: Any
    replica: int
    host: str

    def follow(self, meter: HostMeter) -> str:
        """Report what a meter measures until the process ends, from a thread of its own; the process's name there."""
        mark = secrets.token_hex(4)  # processes of two machines may have the same id
        process = f"{self.host} of replica {self.replica}, process {os.getpid()} {mark}"

        def keep_reporting() -> None:
            while True:
                self.board.report_host.remote(process, self.replica, self.host, meter.report())
                time.sleep(REPORT_S)

        threading.Thread(target=keep_reporting, name="report", daemon=True).start()
        return process
