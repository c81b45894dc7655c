"""What must hold at the end of a schedule, and of every command in it."""

from __future__ import annotations

import functools
import io
import json
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from simulation import memo
from simulation.faults import KINDS, ROW_FAILS

if TYPE_CHECKING:
    from simulation.schedule import Simulation


@functools.cache
def undisturbed(topology: str) -> dict[str, bytes]:
    """The files of the run of a topology that nothing disturbs."""
    from simulation.schedule import Schedule, Simulation

    simulation = Simulation(Schedule(0, "local", "disk", topology, 3, 1, False, False, (0.0,), ()))
    simulation.run()
    simulation.world.stop()
    assert not simulation.world.violations, simulation.world.violations
    return simulation.files()


def check_end(simulation: Simulation) -> None:
    """Files, counts and endings of a schedule."""
    _check_endings(simulation)
    if simulation.endings and simulation.endings[-1].code == 0 and not _has_other_bits(simulation):
        _check_files(simulation)


def _has_other_bits(simulation: Simulation) -> bool:
    return any(fault.kind == "other bits" for fault in simulation.schedule.faults)


def _check_endings(simulation: Simulation) -> None:
    """Every command ends with a reason that something which happened explains."""
    world, fired = simulation.world, simulation.inject.fired
    explained = {error for fault in fired for error in KINDS[fault.kind].errors}
    for ending in simulation.endings:
        if ending.code == 0 or ending.kind == "killed":
            continue
        if not ending.message.strip():
            world.violate(f"{ending.name} ended with {ending.kind} and without a reason")
        if ending.kind not in explained:
            world.violate(f"{ending.name} ended with {ending.kind}, which nothing explains: {ending.message}")

    if _has_other_bits(simulation) and not any(KINDS[fault.kind].fails_hosts for fault in fired):
        for ending in simulation.endings:
            if ending.code == 0 and ending.name in simulation.differing:
                world.violate(f"{ending.name} computed other bits than those that are there, and did not say so")


def _check_files(simulation: Simulation) -> None:
    world, found = simulation.world, simulation.files()
    expected = undisturbed(simulation.schedule.topology)
    simulation.bind()  # the other one was the present one
    named = {name for record in _records(found) for name in record["sha256_by_file"]}
    # what a killed writer left, and failed rows of a late attempt, which nothing names
    left = [name for name in found if name.rpartition("/")[2].startswith(".") and not name.startswith(".hugging")]
    left += [name for name in found if name.startswith("_failed/") and name not in named]
    failed = _failed_rows(found)
    extra = {row_id: reason for row_id, reason in failed.items() if row_id != memo.FAILED_ROW}
    if memo.FAILED_ROW not in failed:
        world.violate(f"row {memo.FAILED_ROW}, which cannot be read, has not failed")
    if extra and not _may_fail(simulation, extra):
        world.violate(f"rows failed that nothing had failed: {extra}")
    _check_rows(simulation, found, expected, set(failed))
    if not extra:
        for name in sorted(expected.keys() | found.keys()):
            if name in left or name.startswith("_commits/") or name in ("_plan.json", "_manifest.json"):
                continue
            if name not in found or name not in expected:
                world.violate(f"{name} is {'missing' if name in expected else 'of no use'}")
            elif found[name] != expected[name]:
                world.violate(f"{name} differs from that of the undisturbed run")
    _check_manifest(simulation, found, failed)


def _failed_rows(files: dict[str, bytes]) -> dict[str, str]:
    """The reasons of failed rows, of the files that data files name, by row id."""
    named = {name for record in _records(files) for name in record["sha256_by_file"] if name.startswith("_failed/")}
    return {row["row_id"]: row["error"] for name in named if name in files for row in _rows(files[name])}


def _records(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [_record(data) for name, data in files.items() if name.startswith("_commits/part-")]


@functools.lru_cache(maxsize=64)
def _record(data: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(data)
    return record


def num_accepted(files: dict[str, bytes]) -> int:
    """Tokens that were proposed and drawn, as the commit records of a run count them."""
    return sum(record["accepted"] for record in _records(files))


@functools.lru_cache(maxsize=512)
def _rows(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return rows


def _may_fail(simulation: Simulation, extra: dict[str, str]) -> bool:
    """Whether rows may have failed: their hosts did, again and again, or lacked memory."""
    fired = simulation.inject.fired
    num_lost = sum(KINDS[fault.kind].fails_hosts for fault in fired)
    no_memory = sum(fault.kind == "host has no memory" for fault in fired)
    is_lasting = any(KINDS[fault.kind].fails_hosts and KINDS[fault.kind].trigger == "lasting" for fault in fired)
    allowed = [ROW_FAILS[0]] if num_lost >= 2 or is_lasting else []
    allowed += [ROW_FAILS[1]] if no_memory >= 2 else []
    return all(any(reason in text for reason in allowed) for text in extra.values())


def _check_rows(simulation: Simulation, found: Any, expected: Any, failed: set[str]) -> None:
    """Every row exactly once, with the values of the undisturbed run."""
    world = simulation.world
    wanted = {row["row_id"]: row for name in expected if name.startswith("part-") for row in _rows(expected[name])}
    there: dict[str, Any] = {}
    for name in found:
        if name.startswith("part-"):
            for row in _rows(found[name]):
                if row["row_id"] in there or row["row_id"] in failed:
                    world.violate(f"row {row['row_id']} is there twice")
                there[row["row_id"]] = row
    for row_id in wanted.keys() | there.keys():
        if row_id in failed or (row_id in there and there[row_id] is wanted.get(row_id)):  # of equal files
            continue
        if row_id not in there:
            world.violate(f"row {row_id} is lost")
        elif repr(there[row_id]) != repr(wanted.get(row_id)):
            world.violate(f"row {row_id} differs from that of the undisturbed run")


def _check_manifest(simulation: Simulation, found: dict[str, bytes], failed: dict[str, str]) -> None:
    """The counts in manifest and status are those of the files."""
    from pipeline.storage.run import Run

    world, inject = simulation.world, simulation.inject
    inject.is_calm = True
    if "_manifest.json" not in found:
        world.violate("the last command ended well and there is no manifest")
        return
    for record in _records(found):
        if record["passes"] + record["accepted"] != record["tokens"]:
            world.violate(f"the passes and accepted tokens of shard {record['shard']} are not its tokens: {record}")
    tree = json.loads(found["_manifest.json"])
    rows = [row for name, data in found.items() if name.startswith("part-") for row in _rows(data)]
    counted = (len(rows), len(failed), sum(row["num_tokens"] for row in rows))
    if (tree["rows_aligned"], tree["rows_failed"], tree["tokens"]) != counted:
        world.violate(f"the manifest counts other rows than the files have: {counted}")
    if "_plan.json" not in found:
        world.violate("the last command ended well and there is no plan")
        return
    status = Run.open(simulation.address, open_store=simulation.open_store).status()
    if (status.rows_aligned, status.rows_failed, status.tokens) != counted:
        world.violate(f"the status counts other rows than the files have: {counted}")
    if not status.is_complete:
        world.violate("the last command ended well and the run is not complete")
    if not any(KINDS[fault.kind].fails_hosts for fault in inject.fired) and status.recoveries.hosts_failed:
        world.violate(f"the status counts {status.recoveries.hosts_failed} failures of hosts, and none failed")
