"""A store: a reader never sees half a file, one writer of a name wins, names stay inside."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from support import storage

from pipeline.errors import ConfigurationError, StorageError
from pipeline.stores.local_store import ABANDONED_AFTER_S
from pipeline.stores.store import LocalStore, ObjectStore, Store, open_store

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with storage.s3_server():
        s3fs.S3FileSystem().mkdir("s3://stores")
        yield "stores"


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "run")
    if request.param == "memory":  # fsspec's generic path, which gs:// takes too
        return ObjectStore(scheme="memory", root=f"bucket/{uuid.uuid4().hex}")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}")


def test_what_is_written_is_read(store: Store) -> None:
    assert store.read("a.json") is None
    store.put("a.json", b"one")
    store.put("a.json", b"two")
    assert store.read("a.json") == b"two"
    with store.open("a.json") as handle:
        handle.seek(1)
        assert handle.read() == b"wo"
    store.remove("a.json")
    store.remove("a.json")
    assert store.read("a.json") is None


def test_create_never_replaces(store: Store) -> None:
    assert store.create("_commits/part-1.json", b"first")
    assert not store.create("_commits/part-1.json", b"second")
    assert store.read("_commits/part-1.json") == b"first"


def test_names_are_listed_by_prefix_in_folders_too(store: Store) -> None:
    assert store.names() == []
    for name in ("part-2", "part-1", "_commits/part-1.json", "_commits/part-2.json", "plan.json"):
        store.put(name, b"x")
    assert store.names("part-") == ["part-1", "part-2"]
    assert store.names("_commits/") == ["_commits/part-1.json", "_commits/part-2.json"]
    assert store.names("_commits/part-2") == ["_commits/part-2.json"]
    assert store.names("none/") == []
    assert len(store.names()) == 5


def test_many_are_read_at_once_and_missing_ones_left_out(store: Store) -> None:
    for index in range(20):
        store.put(f"n{index}", str(index).encode())
    found = store.read_many([f"n{index}" for index in range(25)])
    assert found == {f"n{index}": str(index).encode() for index in range(20)}
    assert store.read_many([]) == {}


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", ".hidden", "a\\b", "a\nb", "a/", "é"]
)
def test_a_name_cannot_leave_the_directory(store: Store, name: str) -> None:
    for action in (store.read, store.open, store.url, store.remove):
        with pytest.raises(StorageError, match="a stored name has"):
            action(name)
    for write in (store.create, store.put):
        with pytest.raises(StorageError, match="a stored name has"):
            write(name, b"x")


def test_opening_what_is_not_there_names_it(store: Store) -> None:
    with pytest.raises(StorageError, match=r"none\.parquet does not exist"):
        store.open("none.parquet")


def _create(store: Store, name: str, data: bytes, start: object, won: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    won.put((data, store.create(name, data)))  # type: ignore[attr-defined]


def test_a_link_whose_reply_was_lost_is_the_writers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the request is sent again, and its second reply says that the name is taken."""
    link = os.link

    def lose_reply(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(target)

    store = open_store(str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lose_reply)
        assert store.create("name", b"mine")
    assert not store.create("name", b"another's")
    assert store.read("name") == b"mine"


def test_of_racing_processes_exactly_one_creates(tmp_path: Path) -> None:
    store, start, won = LocalStore(tmp_path / "run"), SPAWN.Barrier(2), SPAWN.Queue()
    writers = [SPAWN.Process(target=_create, args=(store, "x", each * 100_000, start, won)) for each in (b"a", b"b")]
    for writer in writers:
        writer.start()
    answers = [won.get(timeout=30) for _ in writers]
    for writer in writers:
        writer.join(30)
    winners = [data for data, has_won in answers if has_won]
    assert len(winners) == 1
    assert store.read("x") == winners[0]
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["x"]


def test_of_racing_threads_exactly_one_creates(store: Store) -> None:
    if isinstance(store, ObjectStore) and store.scheme == "memory":
        pytest.skip("fsspec's memory files have no atomic create")
    start, answers = threading.Barrier(8), []

    def create(data: bytes) -> None:
        start.wait()
        answers.append((data, store.create("x", data)))

    threads = [threading.Thread(target=create, args=(bytes([65 + index]) * 50_000,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [data for data, has_won in answers if has_won]
    assert len(winners) == 1
    assert store.read("x") == winners[0]


def _put_for_ever(store: Store) -> None:
    while True:
        for byte, size in ((b"a", 10), (b"b", 3_000_000), (b"c", 70_000)):
            store.put("x", byte * size)


def test_a_reader_never_sees_half_a_file_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    store.put("x", b"a" * 10)
    whole = {b"a" * 10, b"b" * 3_000_000, b"c" * 70_000}
    for _ in range(2):
        writer = SPAWN.Process(target=_put_for_ever, args=(store,))
        writer.start()
        seen: list[bytes] = []
        while len(set(seen)) < 3 or len(seen) < 100:
            assert writer.is_alive()
            seen.append(store.read("x") or b"")
            assert seen[-1] in whole
        writer.kill()
        writer.join(10)
        assert store.read("x") in whole
    assert store.names() == ["x"]


def test_what_a_killed_writer_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("x", b"data")
    old, young = tmp_path / ".x.0a1b.tmp", tmp_path / ".x.0a1c.tmp"
    for file in (old, young):
        file.write_bytes(b"da")
    past = time.time() - ABANDONED_AFTER_S - 1
    os.utime(old, (past, past))
    store.sweep()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".x.0a1c.tmp", "x"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from pipeline.errors import StorageError
from pipeline.stores.store import LocalStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = LocalStore(Path(sys.argv[1]))
for write in (store.put, store.create):
    try:
        write("big", b"x" * 5000)
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_is_reported_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"cannot write {tmp_path}") and "File too large" in line for line in lines)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigurationError, match=r"cannot (write|make the folder)"):
        LocalStore(tmp_path / "file").put("x", b"")
    with pytest.raises(ConfigurationError, match=r"cannot (write|make the folder)"):
        LocalStore(tmp_path / "file" / "below").create("x", b"")
    with pytest.raises(ConfigurationError, match="is a file; a folder is needed"):
        open_store(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("ftp://host/x", "ftp:// is not supported"),
        ("s3://", "must be followed by a bucket's name"),
        ("s3://key:secret@bucket/x", "must be followed by a bucket's name"),
        ("https://bucket.s3.amazonaws.com/x", "https:// is not supported"),
    ],
)
def test_an_address_that_is_not_understood_is_refused_without_its_secrets(path: str, why: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        open_store(path)
    assert why in str(refused.value)
    assert "secret" not in str(refused.value)


def test_addresses_have_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("run").path == str(tmp_path / "run")
    assert open_store(f"file://{tmp_path}/run").path == str(tmp_path / "run")
    assert open_store("s3a://bucket/run/").path == "s3://bucket/run"
    assert open_store("gs://bucket/run") == ObjectStore(scheme="gs", root="bucket/run")


def test_a_missing_client_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)  # or found by an earlier test
    with pytest.raises(ConfigurationError, match="gs:// needs the package gcsfs"):
        open_store("gs://bucket/run").read("plan.json")


class Contended(MemoryFileSystem):
    """Answers the first conditional writes as S3 does while another one of the same name is in flight."""

    protocol = "contended"
    cachable = False
    answers: ClassVar[list[int]] = []

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        if mode == "create" and self.answers:
            error = OSError("conditional write refused")
            error.__cause__ = HttpFault(self.answers.pop(0))
            raise error
        super().pipe_file(path, value, mode=mode)


class HttpFault(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.fixture
def contended() -> ObjectStore:
    fsspec.register_implementation("contended", Contended, clobber=True)
    return ObjectStore(scheme="contended", root=f"bucket/{uuid.uuid4().hex}")


def test_a_conditional_write_in_conflict_is_tried_again(contended: ObjectStore) -> None:
    Contended.answers = [409, 409]
    assert contended.create("x", b"data")
    assert contended.read("x") == b"data"


def test_a_failed_precondition_is_a_lost_race(contended: ObjectStore) -> None:
    Contended.answers = [412]
    assert not contended.create("x", b"data")


def test_another_refusal_is_reported_and_not_tried_again(contended: ObjectStore) -> None:
    Contended.answers = [403]
    with pytest.raises(StorageError, match=r"cannot write contended://bucket/.*/x: conditional write refused"):
        contended.create("x", b"data")
    assert Contended.answers == []


@contextmanager
def failing_server(num_failures: int) -> Iterator[list[str]]:
    """Answers 503 to the first requests, then an object; yields the requests."""
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            is_failure = len(requests) <= num_failures
            body = b"<Error><Code>SlowDown</Code><Message>Reduce</Message></Error>" if is_failure else b"data"
            self.send_response(503 if is_failure else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_MAX_ATTEMPTS": "2"}
        for name, value in {**storage.AWS, **endpoint}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield requests
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.shutdown()


def test_a_throttled_request_is_tried_again() -> None:
    with failing_server(1) as requests:
        assert open_store("s3://bucket/run").read("x") == b"data"
    assert len(requests) >= 2


def test_throttling_without_end_fails_after_bounded_attempts() -> None:
    with (
        failing_server(10**6) as requests,
        pytest.raises(StorageError, match=r"cannot read s3://bucket/run/x: "),
    ):
        open_store("s3://bucket/run").read("x")
    assert 2 <= len(requests) <= 20


def test_a_missing_bucket_is_a_storage_error(bucket: str) -> None:
    store = open_store("s3://no-such-bucket/run")
    assert store.read("plan.json") is None
    writes: list[Callable[[str, bytes], object]] = [store.create, store.put]
    for write in writes:
        with pytest.raises(StorageError, match=r"cannot write s3://no-such-bucket/run/plan.json: .*bucket"):
            write("plan.json", b"x")


def test_a_store_that_does_not_answer_is_a_storage_error_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on the port: the client's own bounded retries end in one line."""
    for name, value in storage.AWS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StorageError, match=r"cannot read s3://bucket/run/plan.json: .*127.0.0.1:9"):
            open_store("s3://bucket/run").read("plan.json")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_file_system_that_takes_no_folders_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^cannot make the folder /proc/runs: its file system takes no new folders$"
    ):
        open_store("/proc/runs").create("_plan.json", b"{}")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", r"file is a file; a folder is needed$"),
        ("file/run", r"file is a file; a folder is needed, so it cannot hold 'run'$"),
        ("file/a/b", r"file is a file; a folder is needed, so it cannot hold 'a/b'$"),
        ("link", r"link is a link to '/no/where', which does not exist$"),
        ("link/run", r"link is a link to '/no/where', which does not exist$"),
        ("a" * 300, r"^no folder can be at '.*: file name too long$"),
        ("loop/run", r"^no folder can be at '.*: too many levels of symbolic links$|loop is a link to"),
    ],
)
def test_a_place_that_cannot_be_a_folder_is_refused_in_one_line(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("/no/where")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigurationError, match=said) as refused:
        open_store(str(tmp_path / place))
    assert "\n" not in str(refused.value)
