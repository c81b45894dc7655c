"""Machines of a Ray cluster that share nothing but the network and the package, which is there as in an image.

A machine is a mount namespace in which the folder of the head is empty: the machine's home, its caches and Ray's
session are there. Other folders can be hidden from it, such as those with a test's prompts and models. It is started
by `ray start` with an address of its own, as `infra/` does.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

UNSHARE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
START_S = 300.0


def has_namespaces() -> bool:
    """Whether this machine lets a process have file systems of its own."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


@dataclass
class Machines:
    """A head, and machines that are added and lost.

    Args:
        hidden: folders that the machines but the head cannot see.
        programs: the folder that has `ray`, of the environment that all processes run in.
        environment: of every process, beside this one's.
    """

    hidden: tuple[Path, ...] = ()
    programs: Path = Path(sys.executable).parent
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="cg", dir="/tmp"))  # Ray's sockets need a short path
        self._token = secrets.token_hex(16)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""

    def start_head(self, *options: str, num_cpus: int = 0) -> None:
        """Start a head, on this machine's own file system, where the driver runs, too."""
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._start(
            "head",
            ["--head", f"--port={port}", f"--num-cpus={num_cpus}", f"--temp-dir={self.folder}",
             "--include-dashboard=false", "--node-ip-address=127.0.0.1", *options],
        )  # fmt: skip

    def add(self, name: str, host: str, *, num_cpus: int) -> None:
        """Start a machine at an address of its own, such as 127.0.0.2."""
        self._start(
            name,
            [f"--address={self.address}", f"--num-cpus={num_cpus}", f"--node-ip-address={host}"],
            namespace=True,
        )

    def run(self, words: list[str], **environment: str) -> subprocess.Popen[str]:
        """Start a command on the head's machine."""
        return subprocess.Popen(
            words,
            env={**self._environment(self.folder), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def nodes(self) -> dict[str, str]:
        """Ray's ids of the machines that are alive, by address."""
        script = (
            "import json, sys, ray; ray.init(address=sys.argv[1], logging_level='CRITICAL'); "
            "print(json.dumps({n['NodeManagerAddress']: n['NodeID'] for n in ray.nodes() if n['Alive']}))"
        )
        return dict(_json(self.ask([sys.executable, "-c", script, self.address])))

    def drain(self, node: str) -> None:
        """Tell Ray that a machine is about to be taken away, as a cloud does of a spot machine."""
        self.ask(
            [str(self.programs / "ray"), "drain-node", f"--address={self.address}", f"--node-id={node}",
             "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=600"],
        )  # fmt: skip

    def ask(self, words: list[str]) -> str:
        """The output of a command on the head's machine."""
        return subprocess.run(
            words, env=self._environment(self.folder), capture_output=True, text=True, check=True, timeout=START_S
        ).stdout

    def lose(self, name: str) -> None:
        """SIGKILL all processes of a machine."""
        process = self._processes.pop(name)
        with contextlib.suppress(psutil.Error):
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    each.kill()
        process.wait()

    def is_up(self, name: str) -> bool:
        """Whether a machine still runs."""
        return self._processes[name].poll() is None

    def stop(self) -> None:
        """End everything."""
        for name in list(self._processes):
            self.lose(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, options: list[str], *, namespace: bool = False) -> None:
        words = [str(self.programs / "ray"), "start", *options, "--block", "--disable-usage-stats"]
        if namespace:
            mounts = [f"mount -t tmpfs tmpfs {shlex.quote(str(each))}" for each in (self.folder, *self.hidden)]
            script = " && ".join([*mounts, f"cd {shlex.quote(str(self.folder))}", 'exec "$@"'])
            words = [*UNSHARE, "sh", "-c", script, "sh", *words]
        with (self.folder / f"{name}.log").open("wb") as log:
            environment = self._environment(self.folder)
            self._processes[name] = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        until_s = time.monotonic() + START_S
        while b"Ray runtime started" not in (self.folder / f"{name}.log").read_bytes():
            if time.monotonic() > until_s or not self.is_up(name):
                raise RuntimeError((self.folder / f"{name}.log").read_text())
            time.sleep(0.2)

    def _environment(self, home: Path) -> dict[str, str]:
        return {
            **os.environ,
            "HOME": str(home),
            "CAGE_CACHE": str(home / "cache"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_agent_register_timeout_ms": "300000",
            "PYTHONPATH": str(Path(__file__).parent.parent.parent),
            **self.environment,
        }


def _json(text: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(text.splitlines()[-1])
    return found


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
