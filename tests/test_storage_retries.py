"""A failure that may be temporary is retried within bounds; any other or lasting one is reported in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from support.commands import cage
from support.failpoints import DiskFull
from support.runs import job, parts, run_job, write_prompts
from support.storage import AWS, answer, small_plan
from werkzeug.serving import make_server

from pipeline.config.files import dump_config
from pipeline.errors import ExitCode, StorageError
from pipeline.storage.run import Run
from pipeline.stores import retries
from pipeline.stores.store import open_store


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAITS_S", (0.01, 0.01, 0.01))


class FaultyS3:
    """moto's S3, which answers writes of data with these errors first; where it `is_broken`, with one for ever."""

    def __init__(self) -> None:
        self._s3 = DomainDispatcherApplication(create_backend_app)
        self.errors: list[tuple[int, str]] = []
        self.is_broken = False
        self.num_refused = 0

    def __call__(self, environ, start_response):
        is_data = environ["REQUEST_METHOD"] == "PUT" and "/part-" in environ["PATH_INFO"]
        if not is_data or not self.errors:
            return self._s3(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = self.errors[0] if self.is_broken else self.errors.pop(0)
        self.num_refused += 1
        start_response(f"{status} refused", [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>".encode()]


@pytest.fixture
def faulty_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    application = FaultyS3()
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_MAX_ATTEMPTS": "2"}
    for name, value in {**AWS, **endpoint}.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with contextlib.suppress(FileExistsError):  # moto keeps its state in this process
        fsspec.filesystem("s3").mkdir("runs")
    yield application
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.shutdown()


ERRORS = [
    (503, "SlowDown"),
    (500, "InternalError"),
    (503, "ServiceUnavailable"),
    (400, "RequestTimeout"),
    (400, "ExpiredToken"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_s3_that_pass_cost_time_and_nothing_else(
    impatient: None, faulty_s3: FaultyS3, tmp_path: Path, error: tuple[int, str]
) -> None:
    run = s3_run(tmp_path)
    faulty_s3.errors = [error] * 3
    run.commit(0, [answer(row) for row in run.plan.read_shard(0)])
    assert faulty_s3.num_refused == 3
    assert set(run.committed()) == {0}


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_s3_that_stay_end_in_one_line_and_the_run_goes_on_later(
    impatient: None, faulty_s3: FaultyS3, tmp_path: Path, error: tuple[int, str]
) -> None:
    run = s3_run(tmp_path)
    faulty_s3.errors, faulty_s3.is_broken = [error], True
    with pytest.raises(
        StorageError, match=r"cannot write s3://runs/.*/part-00000.*\(tried 4 times in \d+ s\)"
    ) as failure:
        run.commit(0, [answer(row) for row in run.plan.read_shard(0)])
    assert failure.value.exit_code == ExitCode.FAILED
    assert str(failure.value).isprintable()
    assert faulty_s3.num_refused <= 80
    faulty_s3.errors = []
    run.commit(0, [answer(row) for row in run.plan.read_shard(0)], attempt=2)
    assert run.committed()[0].attempt == 2


def s3_run(folder: Path) -> Run:
    path = f"s3://runs/{uuid.uuid4().hex}"
    return Run.create_or_resume(open_store(path), small_plan(folder, path))


def test_a_refusal_that_cannot_pass_is_not_tried_again(faulty_s3: FaultyS3, tmp_path: Path) -> None:
    run = s3_run(tmp_path)
    faulty_s3.errors, faulty_s3.is_broken = [(403, "AccessDenied")], True
    with pytest.raises(StorageError, match=r"AccessDenied it is$"):
        run.commit(0, [answer(row) for row in run.plan.read_shard(0)])
    assert faulty_s3.num_refused == 1


def test_waits_are_bounded_and_not_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for seed in range(2):
        random.seed(seed)
        with pytest.raises(StorageError, match=r"cannot write x: .*No space left on device \(tried 4 times"):
            retries.retried("write x", fail)
    assert len(waited) == 6
    assert waited[:3] != waited[3:]
    assert max(waited) <= 1.5 * max(retries.WAITS_S)


def test_after_the_time_limit_there_is_no_further_try(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "GIVE_UP_S", 0.0)  # over when the first try ends
    num_tries = 0

    def fail() -> None:
        nonlocal num_tries
        num_tries += 1
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StorageError, match=r"cannot read x: .*Input/output error$"):
        retries.retried("read x", fail)
    assert num_tries == 1


@pytest.mark.parametrize(
    "answer", [FileNotFoundError("timed out"), FileExistsError("expired"), StorageError("timeout")]
)
def test_an_error_that_is_an_answer_is_raised_as_it_is_after_one_try(answer: Exception) -> None:
    """Their texts would count as temporary failures."""
    num_tries = 0

    def answer_with_error() -> None:
        nonlocal num_tries
        num_tries += 1
        raise answer

    with pytest.raises(type(answer)) as raised:
        retries.retried("read x", answer_with_error)
    assert raised.value is answer
    assert num_tries == 1


@pytest.mark.parametrize("num_failures", [2, 10**6])
def test_a_full_disk_is_waited_for_and_then_reported(
    impatient: None, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    run_job(job(prompts, tmp_path / "whole", tiny()), tmp_path)
    config = job(prompts, tmp_path / "run", tiny())
    plain = os.fsync
    full = DiskFull(num_failures)
    try:
        if num_failures > 3:
            with pytest.raises(StorageError, match=r"cannot write .*part-00000.*No space left on device \(tried 4"):
                run_job(config, tmp_path, watch=full)
            assert not list((tmp_path / "run").rglob(".*.tmp"))
            os.fsync = plain
            run_job(config, tmp_path)
        else:
            run_job(config, tmp_path, watch=full)
    finally:
        os.fsync = plain
    assert Run.open(str(tmp_path / "run")).is_complete
    assert parts(tmp_path / "run") == parts(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
def test_expired_credentials_in_a_replica_end_the_command_with_1_and_it_continues(faulty_s3, tiny, tmp_path):
    """The command as a user gives it, with a cluster of its own: workers have its environment."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    run_job(job(prompts, tmp_path / "whole", tiny()), tmp_path)
    path = f"s3://runs/{uuid.uuid4().hex}"
    config = job(prompts, path, tiny(), cluster={"transport": "ray"})
    (file := tmp_path / "job.yaml").write_text(dump_config(config))
    faulty_s3.errors, faulty_s3.is_broken = [(400, "ExpiredToken")], True
    failed = cage("relabel", "-c", str(file), timeout=500)
    assert failed.returncode == ExitCode.FAILED, failed.stderr
    assert "cannot write s3://runs/" in failed.stderr.splitlines()[-1]
    assert "ExpiredToken it is (tried 4 times" in failed.stderr.splitlines()[-1]
    faulty_s3.errors = []
    continued = cage("relabel", "-c", str(file), "cluster.transport=local", timeout=500)
    assert continued.returncode == ExitCode.DONE, continued.stderr
    store = open_store(path)
    assert {name: store.read(name) for name in store.names("part-")} == parts(tmp_path / "whole")
