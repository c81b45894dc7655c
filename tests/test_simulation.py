"""Deterministic simulation: many schedules lose, repeat and change nothing, and planted faults are found."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulation import cli
from simulation.faults import KINDS, Fault
from simulation.mutants import MUTANTS
from simulation.patches import NEEDS_NOTHING, OUTSIDE, SIMULATED, simulated
from simulation.schedule import Schedule, draw, run_schedule
from simulation.shrink import fewest, shrink
from support.commands import ROOT
from support.failpoints import Failpoint

NUM_SCHEDULES = 500
FOUND_IN_CI = [
    "commits are not create-only",
    "hashes are not compared",
    "the stall watch never fires",
]


@pytest.mark.slow
def test_schedules_lose_repeat_and_change_nothing_and_every_fault_occurs():
    tally = cli.run_seeds(range(NUM_SCHEDULES))
    assert [(str(result.schedule), result.violations) for result in tally.failed] == []
    assert tally.num_schedules == NUM_SCHEDULES
    assert [kind for kind in KINDS if not tally.faults[kind]] == []
    assert tally.endings["done"] >= NUM_SCHEDULES / 2
    reasons = {"RunStalled", "StorageError", "HostError", "Interrupted", "ConfigurationError", "NondeterminismError"}
    assert reasons <= tally.endings.keys()
    assert tally.num_accepted > NUM_SCHEDULES / 5


def test_drivers_and_hosts_that_die_while_a_model_proposes_tokens_change_nothing():
    """Every third driver of a run has no such model."""
    kills = [Fault("kill", at) for at in (60, 160, 300)]
    schedules = [replace(draw(seed), has_drafts=True, faults=tuple(kills)) for seed in range(5)]
    with simulated():
        results = [run_schedule(each) for each in schedules]
    assert [(str(each.schedule), each.violations) for each in results if each.violations] == []
    assert sum(len(each.fired) for each in results) > len(schedules)
    assert sum(each.num_accepted for each in results) > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [name if name in FOUND_IN_CI else pytest.param(name, marks=pytest.mark.nightly) for name in MUTANTS]
)
def test_planted_faults_are_found(mutant):
    found = cli.find(mutant, range(2000))
    assert found is not None
    with simulated():
        assert run_schedule(found.schedule).violations == []  # it is the planted fault that was found


def test_a_failing_schedule_is_shown_shrunk_and_replayed():
    out = io.StringIO()
    assert cli.main(["--schedules", "200", "--mutant", "commits are not create-only"], out) == 1
    text = out.getvalue()
    command = next(line for line in text.splitlines() if line.startswith("replay: "))
    replayed = io.StringIO()
    schedule = command.partition("--replay '")[2].rstrip("'")
    assert cli.main(["--mutant", "commits are not create-only", "--replay", schedule], replayed) == 1
    violations = [line for line in replayed.getvalue().splitlines() if line.startswith("  ! ")]
    assert violations
    assert all(line in text for line in violations)
    assert cli.main(["--replay", schedule], io.StringIO()) == 0


def test_the_fewest_items_are_found():
    tried: list[Any] = []

    def is_bad(some: Any) -> bool:
        tried.append(some)
        return {3, 11} <= set(some)

    assert fewest(range(16), is_bad) == [3, 11]
    assert len(tried) < 60
    assert fewest([7], lambda some: True) == []


def test_shrinking_leaves_out_what_does_not_matter():
    cause = Fault("kill", 40)
    faults = (Fault("interrupt", 5), cause, Fault("kill", 9))
    schedule = Schedule(1, "ray", "s3", "pair", 8, 2, True, True, (0.0, 1.0), faults)
    least = shrink(schedule, lambda each: cause in each.faults)
    assert least == Schedule(1, "ray", "s3", "lone", 2, 1, False, False, (0.0,), (cause,))


def test_a_schedule_comes_out_the_same_in_another_process():
    """Also where Python's own hashes of strings differ."""
    schedule = draw(12)
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from simulation import cli\n"
        f"cli.main(['--replay', {schedule.to_json()!r}])\n"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
    assert "ends with 0" in texts.pop()


def test_schedules_are_written_and_read():
    for seed in range(50):
        assert Schedule.from_json(draw(seed).to_json()) == draw(seed)


def test_kills_at_points_know_the_points_of_the_chaos_command():
    points = {fault.point for seed in range(3000) for fault in draw(seed).faults if fault.kind == "kill at point"}
    assert points == set(map(str, Failpoint))


def test_whatever_a_run_takes_from_outside_is_simulated():
    """A module of the run that imports time, threads, random numbers or Ray is in the table, or needs nothing."""
    unknown = []
    for package in ("cluster", "engine", "monitoring", "runtime", "sampling", "stages", "storage", "stores"):
        for file in sorted((ROOT / "pipeline" / package).glob("*.py")):
            name = f"pipeline.{package}.{file.stem}"
            outside = _imported(file) & OUTSIDE
            missing = outside - set(SIMULATED.get(name, {}))
            if missing and name not in NEEDS_NOTHING:
                unknown.append((name, missing))
    assert unknown == []


def _imported(file: Path) -> set[str]:
    """The modules from outside that a module imports at its top, by first names."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names}
            first = node.module.partition(".")[0]
            found.update({"Future"} & names if first == "concurrent" else {first} - {"ray"})
    return found


def test_the_names_that_are_simulated_are_there_and_come_back():
    before = {place: _names(place) for place in SIMULATED}
    with simulated():
        assert _names("pipeline.stores.local_store")["os"] is not before["pipeline.stores.local_store"]["os"]
    assert {place: _names(place) for place in SIMULATED} == before


def _names(place: str) -> dict[str, Any]:
    from simulation.patches import _find

    return {name: vars(_find(place))[name] for name in SIMULATED[place]}


def test_there_are_enough_planted_faults():
    assert len(MUTANTS) >= 12
    assert set(FOUND_IN_CI) <= MUTANTS.keys()
