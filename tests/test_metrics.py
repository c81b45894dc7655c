"""Metrics of a run: what each report becomes, and what the dashboard asks for. test_image.py scrapes a cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
from support.dashboard import DASHBOARD, asked_by_dashboard

from pipeline.cluster.board import ProgressBoard
from pipeline.monitoring import host_meter
from pipeline.monitoring.counts import Counts, Recoveries, Work
from pipeline.monitoring.host_meter import HostMeter
from pipeline.monitoring.metrics import (
    METRICS,
    HostReport,
    Load,
    MetricKind,
    ReplicaReport,
    values_of_host,
    values_of_replica,
)
from pipeline.protocol.messages import HostWork


def exported_name(metric):
    """Ray's name for a metric, as Prometheus reads it."""
    return f"ray_{metric.name}" + ("_total" if metric.kind is MetricKind.COUNTER else "")


def test_the_dashboard_shows_every_metric_and_no_other():
    assert asked_by_dashboard() == {exported_name(metric) for metric in METRICS}


def test_every_metric_has_a_value_in_a_report_and_a_row_in_the_documentation():
    found = [*values_of_replica(Counts(), ReplicaReport()), *values_of_host("base", HostReport())]
    assert {value.metric for value in found} == set(METRICS)
    assert all(len(value.labels) == len(value.metric.labels) for value in found)
    page = (DASHBOARD.parent.parent / "docs/operations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(cage_\w+)` \|", page, flags=re.MULTILINE)) == {metric.name for metric in METRICS}


def test_reports_become_values():
    counts = Counts(
        9, 2, 70, 30, Recoveries(hosts_failed=1, memory_halved=3), work=Work(80, 300, 4, solve_s=0.5, wait_s=6.0)
    )
    report = ReplicaReport(0, Load(8, 5, 2), {"committed": 3}, {"HostError": 2, "StorageError": 1}, {"storage": 7})
    values = {(value.metric.name, *value.labels): value.number for value in values_of_replica(counts, report)}
    assert values["cage_rows", "aligned"] == 7
    assert values["cage_rows", "failed"] == values["cage_errors", "RowError"] == 2
    assert values["cage_errors", "HostError"] == 3
    assert values["cage_errors", "StorageError"] == 1
    assert values["cage_errors", "HostOutOfMemory"] == 3
    assert values["cage_retries", "storage"] == 7
    assert values["cage_retries", "shard"] == values["cage_shards", "failed"] == 0
    assert values["cage_games",] == 80
    assert values["cage_unsolved_games",] == 4
    assert values["cage_solver_steps",] == 300
    assert values["cage_solve_seconds", "coordinator"] == 0.5
    assert values["cage_slots_used",] == 5


@dataclass
class Exported:
    """Remembers what is exported, as `MetricExporter` hands it to Ray."""

    reports: list = field(default_factory=list)
    cleared: list = field(default_factory=list)

    def export(self, process, replica, values):
        self.reports.append((process, replica, list(values)))

    def clear(self, replica, values):
        self.cleared.append((replica, {value.metric.name for value in values}))


def test_gauges_of_a_replica_that_is_gone_are_cleared_unless_another_process_has_its_number(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pipeline.cluster.board.time.monotonic", lambda: clock[0])
    exported = Exported()
    board = ProgressBoard(2, make_exporter=lambda: exported)
    board.report("old", Counts(), (), ReplicaReport(0))
    board.report("two", Counts(), (), ReplicaReport(1))
    board.report_host("base in two", 1, "base", HostReport())
    clock[0] = 30.0
    board.report("new", Counts(), (), ReplicaReport(0))
    assert {replica for replica, _ in exported.cleared} == {1}
    assert "cage_cache_bytes" in exported.cleared[-1][1]
    board.report("without a number", Counts())
    assert [process for process, _, _ in exported.reports] == ["old", "two", "base in two", "new"]


def test_a_host_is_idle_between_its_calls_and_not_within_them():
    clock = [10.0]
    meter = HostMeter(lambda: HostWork(num_forwards=3), clock=lambda: clock[0])
    clock[0] += 2
    with meter.calling():
        clock[0] += host_meter.REFRESH_S
        with meter.calling():  # a device that goes on by itself has two at once
            clock[0] += 1
        assert meter.report().idle_s == 2
    clock[0] += 4
    assert meter.report() == HostReport(HostWork(num_forwards=3), 6.0)
    with pytest.raises(KeyError), meter.calling():
        raise KeyError
    assert meter.report().idle_s == 6


def test_what_a_host_did_since_the_last_look_is_read_when_it_is_asked_for():
    work = [HostWork(num_forwards=1)]
    meter = HostMeter(lambda: work[0], clock=lambda: 10.0)
    with meter.calling():
        pass
    work[0] = HostWork(num_forwards=2)
    with meter.calling():
        pass
    assert meter.report().work.num_forwards == 1
    assert meter.read().work.num_forwards == 2
    assert meter.report().work.num_forwards == 2
