"""`cage doctor` and the options of `cage status`: what they find, and that they say it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from support.commands import cage
from support.runs import job, run_job, write_prompts
from typer.testing import CliRunner

from jobs import cli
from jobs.commands.status import describe_status, replica_paces, run_status, slow_shards
from pipeline.stages import doctor
from pipeline.stages.doctor import Verdict, examine
from pipeline.stores.store import open_store


def findings(**where):
    found = {}
    for each in examine(**{"storage": None, "address": None, **where}):
        found.setdefault(each.area, []).append(each)
    return found


def test_this_machine_can_run_and_its_folder_takes_commits(tmp_path):
    done = cage("doctor", "--storage", str(tmp_path / "runs"), "--json")
    assert done.returncode == 0, done.stderr
    found = {each["area"]: each for each in json.loads(done.stdout)}
    assert set(found) == {"python", "packages", "processor", "memory", "gpu", "compiler", "clock", "storage"}
    assert found["clock"]["verdict"] == "ok"
    assert "torch" in found["packages"]["text"]
    assert found["storage"]["verdict"] == "ok"
    assert not [name for name in (tmp_path / "runs").iterdir() if name.name.startswith("_doctor")]


def test_a_place_that_cannot_be_written_ends_with_exit_code_1(tmp_path):
    (tmp_path / "file").write_text("")
    done = cage("doctor", "--storage", str(tmp_path / "file" / "runs"))
    assert done.returncode == 1
    assert "storage" in done.stdout
    assert "missing" in done.stdout
    assert done.stderr.strip() == "cage: runs will fail here: storage"


def test_a_store_that_lets_two_writers_win_is_told(monkeypatch):
    store = SimpleNamespace(
        path="x",
        create=lambda name, data: True,
        read=lambda name: b"second",
        remove=lambda name: None,
        url=lambda name: __file__,
    )
    monkeypatch.setattr(doctor, "open_store", lambda path: store)
    (found,) = findings(storage="x")["storage"]
    assert found.verdict is Verdict.MISSING
    assert "two drivers could both commit a shard" in found.text


@pytest.mark.parametrize(("ahead_s", "said"), [(600, "600 s ahead of"), (-90, "90 s behind")])
def test_a_clock_that_is_off_is_told(tmp_path, monkeypatch, ahead_s, said):
    written_at = doctor._written_at
    monkeypatch.setattr(doctor, "_written_at", lambda url: written_at(url) - ahead_s)
    (found,) = findings(storage=str(tmp_path))["clock"]
    assert found.verdict is Verdict.SLOW
    assert said in found.text


def test_a_compiler_is_needed_for_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (found,) = findings()["compiler"]
    assert found.verdict is Verdict.OK
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (found,) = list(doctor._compiler())
    assert found.verdict is Verdict.SLOW
    assert "cannot be built" in found.text


def test_status_tells_the_pace_of_each_replica_and_which_shards_are_slow():
    def record(shard, at_s, host, seconds):
        return SimpleNamespace(shard=shard, committed_at=at_s, host=host, seconds=seconds, tokens=100)

    records = [record(at, 10.0 * at, "ab" if at % 2 else "cd", 20.0) for at in range(8)]
    records.append(record(8, 90.0, "cd", 95.0))
    assert replica_paces(records) == {"ab": 5.0, "cd": pytest.approx(400 / 90)}
    assert slow_shards(records) == {8: 95.0}
    assert replica_paces(records[:1]) == {}
    assert slow_shards(records[:3]) == {}


def test_what_is_slow_is_said(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(doctor, "_bits_are_a_rows_own", lambda: False)
    found = findings()
    assert [each.verdict for each in found["python"]] == [Verdict.OK, Verdict.SLOW]
    (processor,) = found["processor"]
    assert processor.verdict is Verdict.SLOW
    assert "strict runs decode rows one at a time" in processor.text


def test_a_missing_package_and_a_check_that_breaks_are_findings(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "_memory", lambda: 1 / 0)
    found = findings()
    assert found["packages"][0].verdict is Verdict.MISSING
    assert "no-such-package" in found["packages"][0].text
    assert found["memory"][0].verdict is Verdict.MISSING


def test_status_as_json_has_every_number(tiny, tmp_path, capsys):
    config = job(write_prompts(tmp_path / "in.jsonl"), tmp_path / "run", tiny("llama"))
    run, _ = run_job(config, tmp_path)
    run_status(str(tmp_path / "run"), as_json=True)
    tree = json.loads(capsys.readouterr().out)
    assert tree["is_complete"] is True
    assert (tree["num_rows"], tree["rows_aligned"], tree["shards_done"]) == (11, 11, 4)
    assert tree["seconds_left"] is None
    assert tree["digest"] == run.plan.digest


def test_status_tells_the_pace_of_the_last_shards_and_watches_until_the_end(tiny, tmp_path, capsys, monkeypatch):
    config = job(write_prompts(tmp_path / "in.jsonl"), tmp_path / "run", tiny("llama"))
    run, _ = run_job(config, tmp_path)
    store = open_store(str(tmp_path / "run"))
    whole = {name: store.read(name) for name in ("_SUCCESS", "_manifest.json")}
    last = [name for name in store.names("_commits/") if "00003" in name]
    kept = {name: store.read(name) for name in last}
    for name in (*whole, *last):
        store.remove(name)
    unfinished = type(run).open(str(tmp_path / "run"))
    assert "tokens/s over the last shards; at that pace" in describe_status(unfinished)

    def finish(seconds):
        assert seconds == 5.0
        for name, data in (kept | whole).items():
            store.put(name, data)

    monkeypatch.setattr("jobs.commands.status.time.sleep", finish)
    run_status(str(tmp_path / "run"), every_s=5.0)
    shown = capsys.readouterr().out
    assert "not complete" in shown
    assert shown.rstrip().splitlines()[-1].strip().startswith("load")
    assert "4 of 4" in shown


@pytest.mark.parametrize(
    ("words", "every_s"),
    [
        (["RUN"], None),
        (["RUN", "--watch"], 10.0),
        (["--watch", "RUN"], 10.0),
        (["--watch", "--json", "RUN"], 10.0),
        (["RUN", "--watch", "30"], 30.0),
        (["--watch", "2.5", "RUN"], 2.5),
        (["RUN", "--watch=4"], 4.0),
    ],
)
def test_status_is_watched_with_a_number_and_without_one(words, every_s, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "jobs.commands.status.run_status", lambda run, **options: asked.append((run, options["every_s"]))
    )
    found = CliRunner().invoke(cli.app, ["status", *words])
    assert found.exit_code == 0, found.output
    assert asked == [("RUN", every_s)]


def test_status_is_not_watched_more_often_than_each_second():
    found = CliRunner().invoke(cli.app, ["status", "RUN", "--watch", "0"])
    assert found.exit_code == 2
    assert "Invalid value for '--watch': Input should be greater than or equal to 1" in found.output


@pytest.mark.ray
def test_a_cluster_is_described_and_one_that_does_not_answer_is_missing(ray_cluster):
    import ray

    (found,) = findings(address=ray.get_runtime_context().gcs_address)["cluster"]
    assert found.verdict is Verdict.OK
    assert "1 machines" in found.text
