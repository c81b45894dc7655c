"""Inputs, records and an S3 server for the tests of storage."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.records import FinishReason, Record, Row
from pipeline.storage.plan import Plan, make_plan
from pipeline.stores.store import Store

PRINCIPALS = {
    "brief": {"kind": "prompted", "principle": "be brief"},
    "kind-1": {"kind": "prompted", "principle": "be kind"},
}
MODELS = {"base": "tiny@abc123", "principals.brief.model": "tiny@abc123"}
AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    """Write one line a record; bytes are written as they are."""
    lines = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in records]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def make_config(path: str | Path, run: str | Path = "unused", **sections: Any) -> Config:
    """A configuration for the input at `path`; `input`, `output`, `decoding`, ... add to a section."""
    tree: dict[str, Any] = {"principals": PRINCIPALS, **sections}
    tree["input"] = {"path": str(path), **sections.get("input", {})}
    tree["output"] = {"path": str(run), "rows_per_shard": 3, **sections.get("output", {})}
    return parse_config(tree)


def small_plan(folder: Path, run: str | Path | None = None, *, num_rows: int = 7, **sections: Any) -> Plan:
    """A plan over a small JSONL file in `folder`."""
    path = write_jsonl(folder / "prompts.jsonl", ({"prompt": f"question {index}"} for index in range(num_rows)))
    return make_plan(make_config(path, run or folder / "run", **sections), MODELS)


def answer(row: Row, *, sample: int = 0, text: str = "", error: str | None = None, **fields: Any) -> Record:
    """A record for a row, a plain function of the row; failed where the row is or `error` says so."""
    error = error or row.error
    response = None if error else text or f"answer to {row.row_id} ({sample})"
    return Record(
        row_id=row.row_id,
        sample=sample,
        prompt=row.messages,
        response=response,
        finish_reason=FinishReason.ERROR if error else FinishReason.STOP,
        num_tokens=len(response or ""),
        weights=dict.fromkeys(PRINCIPALS, 1.0),
        rewards={name: len(row.row_id) / 7 + index for index, name in enumerate(PRINCIPALS)},
        payments={name: None if error else 0.1 * index for index, name in enumerate(PRINCIPALS)},
        kl_per_token=None if error else 0.1 + 0.2,
        error=error,
        **fields,
    )


def tree_bytes(folder: Path, pattern: str = "**/*.parquet") -> dict[str, bytes]:
    """The content of every matching file by its relative name."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob(pattern))}


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 on loopback from memory; yield the endpoint. The environment points every client to it."""
    import fsspec

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_server(port, server)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**AWS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
                patch.setenv(name, value)
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            yield f"http://127.0.0.1:{port}"
            fsspec.get_filesystem_class("s3").clear_instance_cache()
    finally:
        server.terminate()
        server.wait(10)


def wait_for_server(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server of this machine answers. Raises RuntimeError where it ends, or does not answer."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError("the server did not start")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("the server does not answer")


class Killed(Exception):
    """Stands for SIGKILL between two writes."""


@dataclass
class DyingStore:
    """A store that dies at its n-th write, before or after it took effect."""

    store: Store
    dies_at: int
    is_after: bool
    num_writes: int = 0

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self.store, name)
        return self._write(inner) if name in ("create", "put", "remove") else inner

    def _write(self, inner: Any) -> Any:
        def write(*given: Any) -> Any:
            self.num_writes += 1
            if self.num_writes == self.dies_at and not self.is_after:
                raise Killed
            answer = inner(*given)
            if self.num_writes == self.dies_at:
                raise Killed
            return answer

        return write
