"""Whole runs with a model that proposes tokens: rows that are run again, and processes that die."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq
import pytest
from support.chaos_drivers import finish, start
from support.draft_models import perturbed
from support.failpoints import Failpoint, KillAt
from support.runs import job, parts, run_job
from support.unreliable import FreePace

from jobs.commands.status import describe_status
from pipeline.engine import drafting
from pipeline.engine.model_drafts import ModelDrafts
from pipeline.stages.retry import Retry, retry
from pipeline.storage.run import Run

GOOD = [{"id": f"r{at}", "prompt": "tell me " * (at % 4) + "x" * (at + 1)} for at in range(7)]
BAD = [{**row, "prompt": None} if row["id"] in ("r1", "r2", "r4") else row for row in GOOD]
DECODING = {"max_new_tokens": 12, "agent_temperature": 50.0}  # so that the game is near the base's


@pytest.fixture(autouse=True)
def free_passes(monkeypatch):
    monkeypatch.setattr(drafting, "Pace", FreePace)
    monkeypatch.setattr(ModelDrafts, "_how_many", lambda self, ranked, *_: len(ranked))


@pytest.fixture(scope="module")
def sketch(tiny, tmp_path_factory):
    return perturbed(tmp_path_factory.mktemp("sketch") / "model", tiny())


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The files of a run over the good rows without drafts."""
    folder = tmp_path_factory.mktemp("whole")
    run_job(job(written(folder, GOOD), folder / "run", tiny(), decoding=DECODING), folder)
    return parts(folder / "run")


def written(folder, rows):
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "prompts.jsonl"


def drafted(prompts, output, base, model, **sections):
    decoding = {**DECODING, "draft": ["model"], "draft_model": str(model)}
    return job(prompts, output, base, decoding=decoding, cluster={"slots": 2}, **sections)


def rows_of(files):
    return [row for data in files.values() for row in pq.read_table(io.BytesIO(data)).to_pylist()]


def check_counts(folder):
    """Every token took a pass, or was proposed and accepted; the tokens that were."""
    records = Run.open(str(folder)).committed().values()
    assert [record.passes + record.accepted for record in records] == [record.tokens for record in records]
    return sum(record.accepted for record in records)


@pytest.mark.parametrize("is_split", [False, True])
def test_rows_that_are_run_again_have_the_same_bytes_and_their_passes_are_counted(
    tiny, sketch, whole, tmp_path, is_split
):
    run_job(drafted(written(tmp_path, BAD), tmp_path / "run", tiny(), sketch, errors={"budget": 3}), tmp_path)
    before = check_counts(tmp_path / "run")
    mended = written(tmp_path, GOOD)
    for only in (["r4"], ["r1", "r2"]) if is_split else ([],):
        retry(Retry(str(tmp_path / "run"), only=only, mended=str(mended)), tmp_path / "cache", io.StringIO())
    assert rows_of(parts(tmp_path / "run")) == rows_of(whole)
    assert check_counts(tmp_path / "run") > before + 3
    run = Run.open(str(tmp_path / "run"))
    assert "tokens were proposed and drawn, and took no pass of their own" in describe_status(run)


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        (Failpoint.MID_PREFILL, 2),
        (Failpoint.MID_STEP, 5),
        (Failpoint.AFTER_COMMIT, 1),
        (Failpoint.BEFORE_MANIFEST, 1),
    ],
)
def test_a_run_that_was_killed_goes_on_with_or_without_the_model(tiny, sketch, whole, tmp_path, point, nth):
    """Hosts and coordinator are one process here; `simulation` kills them one by one."""
    prompts, output = written(tmp_path, GOOD), tmp_path / "run"
    config = drafted(prompts, output, tiny(), sketch)
    killed = start(config, tmp_path, KillAt(point, tmp_path, nth))
    killed.join()
    assert killed.exitcode == -9
    # the command that goes on may have no drafts
    without = job(prompts, output, tiny(), decoding=DECODING, cluster={"slots": 2})
    finish(without if point is Failpoint.AFTER_COMMIT else config, tmp_path)
    assert parts(output) == whole
    assert check_counts(output) > 0
