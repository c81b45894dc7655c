"""The main job with input and output on gs://, by a stand-in for gcsfs: its class, its signatures, its errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from support.runs import job, parts, run_job, write_prompts

from pipeline.storage.run import Run
from pipeline.stores import retries


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"Backend Error, {code}")
        self.code = code


class Bucket(MemoryFileSystem):
    """Buckets in memory. `refusals` are answered to writes before anything is stored."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refusals: ClassVar[list[int]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("gs://").removeprefix("gcs://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", chunksize: int = 50 * 2**20) -> None:
        assert chunksize > len(value)  # a write in several requests could be seen half done
        if self.refusals:
            raise HttpError(self.refusals.pop(0))
        if mode == "create" and self.exists(path):
            raise FileExistsError(path)
        super().pipe_file(path, value)


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setitem(_registry, "gs", Bucket)  # fsspec has no public way to take a registration back
    yield fsspec.filesystem("gs")
    Bucket.store.clear()


def test_a_run_from_gs_to_gs_has_the_bytes_of_a_local_one(gs, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "WAITS_S", (0.01, 0.01))
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    gs.pipe_file("gs://bucket/in/prompts.jsonl", prompts.read_bytes())
    config = job("gs://bucket/in/prompts.jsonl", "gs://bucket/run", tiny())
    Bucket.refusals = [503, 429]
    run_job(config, tmp_path)
    names = Run.open("gs://bucket/run").store.names("part-")
    assert {name: gs.cat_file(f"gs://bucket/run/{name}") for name in names} == parts(tmp_path / "run")
    gs.rm_file("gs://bucket/run/_SUCCESS")
    gs.rm_file("gs://bucket/run/_commits/part-00001.json")
    run, was_run = run_job(config, tmp_path)
    assert was_run
    assert run.is_complete
    assert run.find("r5")[0]["response"] is not None
