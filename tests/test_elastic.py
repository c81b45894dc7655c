"""Replicas on a cluster whose machines come and go: who waits, who gives up, and that answers stay the same."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from jobs.commands.plan import _replicas
from pipeline.cluster import replica as replicas
from pipeline.cluster.assignments import QUIET_S, Assignments, Waiting
from pipeline.cluster.board import ProgressBoard
from pipeline.config.files import parse_config
from pipeline.config.sections import ClusterConfig
from pipeline.errors import ConfigurationError, HostError, ReplicaReleased
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.metrics import Load, ReplicaReport


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def elastic(clock, fewest=1, most=3):
    return Assignments(fewest, most, start_timeout_s=60, clock=clock)


def test_a_number_of_replicas_is_a_range_of_one():
    assert (ClusterConfig(replicas=3).replica_range.min, ClusterConfig(replicas=3).replica_range.max) == (3, 3)
    given = ClusterConfig(replicas={"max": 5}).replica_range
    assert (given.min, given.max) == (1, 5)
    assert _replicas(given) == "1 to 5 replicas"
    assert _replicas(ClusterConfig(replicas=1).replica_range) == "1 replica"
    for wrong, said in (
        ({"min": 3, "max": 2}, "min 3 and max 2"),
        ({"min": 0, "max": 2}, "min"),
        ({"min": 2}, "max"),
    ):
        tree = {"input": {"path": "a"}, "output": {"path": "b"}, "cluster": {"replicas": wrong}}
        with pytest.raises(ConfigurationError, match=said):
            parse_config(tree)


def test_a_replica_waits_while_others_are_at_work(clock):
    work = elastic(clock)
    work.get_place(0)
    work.begin(7, 0)
    work.begin(8, 1)
    clock.now_s += 10_000
    assert work.wait(1, 10_000) is Waiting.GO_ON


def test_a_replica_gives_its_shards_up_once_nobody_else_has_any(clock):
    work = elastic(clock)
    work.get_place(0)
    work.begin(7, 0)
    work.begin(8, 1)
    work.end(7, 0)
    clock.now_s += QUIET_S / 2
    assert work.wait(1, 5) is Waiting.GO_ON
    clock.now_s += QUIET_S / 2
    assert work.wait(1, 10) is Waiting.GIVE_UP_SHARDS
    assert work.wait(2, 10) is Waiting.GO_ON  # it has none
    work.end(8, 1, was_given_up=True)
    assert work.begin(8, 0) == 1  # giving up is no attempt


def test_without_anybody_to_take_them_over_shards_are_kept_and_the_run_ends_in_time(clock):
    work = elastic(clock)
    work.get_place(0)
    work.begin(7, 0)
    clock.now_s += 30
    assert work.wait(0, 30) is Waiting.GO_ON
    clock.now_s += 59
    assert work.wait(0, 89) is Waiting.GO_ON  # the time counts from when there were too few
    clock.now_s += 2
    assert work.wait(0, 91) is Waiting.END_RUN


def test_a_fixed_number_of_replicas_has_to_be_there_in_time(clock):
    work = elastic(clock, 2, 2)
    work.get_place(0)
    assert work.wait(1, 59) is Waiting.GO_ON
    assert work.wait(1, 60) is Waiting.END_RUN


def test_attempts_on_machines_that_were_lost_do_not_count(clock):
    work = elastic(clock)
    assert [work.begin(7, 0), work.begin(8, 0), work.begin(9, 1)] == [1, 1, 1]
    work.lose_machine(0)
    assert [work.begin(7, 0), work.begin(8, 0), work.begin(9, 1)] == [1, 1, 2]
    work.take_over(0)
    work.lose_machine(0)
    assert work.begin(7, 0) == 2


def test_starts_count_until_a_shard_is_done(clock):
    work = elastic(clock)
    assert [work.start(), work.start()] == [1, 2]
    work.begin(7, 0)
    work.end(7, 0)
    assert work.start() == 1


def test_a_new_replica_takes_the_number_that_was_unheard_for_longest(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("pipeline.cluster.board.time.monotonic", clock)
    board = ProgressBoard(3)
    assert [board.lease(actor) for actor in "abc"] == [0, 1, 2]
    clock.now_s += 5
    for number in (0, 2):
        board.report(str(number), Counts(), (), ReplicaReport(number))
    assert board.lease("d") == 1  # b is the one that is gone


def replica_of(monkeypatch, coordinator=None, watched=None):
    """Replica 2 of three, at its first start, without Ray; the reports that it sends, too."""
    watched, reports = [] if watched is None else watched, []

    def answers(value):
        return SimpleNamespace(remote=lambda *given, **named: value)

    board = SimpleNamespace(
        start=answers(1), lease=answers(2), begin=answers(1), end=answers(None),
        report=SimpleNamespace(remote=lambda *given: reports.append(given[-1])),
    )  # fmt: skip

    def departure(group, *_):
        watched.append(group)
        return SimpleNamespace(unless_leaving=contextlib.nullcontext)

    monkeypatch.setattr(replicas, "ask", lambda answer: answer)
    monkeypatch.setattr(replicas, "Departure", departure)
    monkeypatch.setattr(replicas, "_started", lambda *given: None)
    monkeypatch.setattr("pipeline.cluster.coordinator.Coordinator", lambda *given, **named: coordinator)
    monkeypatch.setattr(replicas.Replica, "_keep_reporting", lambda self: None)
    context = SimpleNamespace(get_node_id=lambda: "node", get_actor_id=lambda: "actor")
    monkeypatch.setattr(
        replicas, "ray", SimpleNamespace(get_runtime_context=lambda: context, get=lambda reference: reference)
    )
    launch = SimpleNamespace(
        groups=("first", "second", "third"), places=("of the only host",), cluster=ClusterConfig(), loads=("base",)
    )
    return replicas.Replica((None,), launch, "run", board, 3), reports


def test_a_replica_watches_the_machines_of_its_own_placement_group(monkeypatch):
    """Its number selects a group; there are as many of them as replicas, and a place for each host in any of them."""
    watched = []
    replica_of(monkeypatch, watched=watched)
    assert watched == ["third"]


def test_a_released_replica_is_no_error(monkeypatch):
    """Its shards go to others, as planned; a shard that fails counts with its class."""

    class Ends:
        counts, load = Counts(), Load()

        def decode_and_commit(self, index, attempt):
            raise ReplicaReleased("no machine") if index else HostError("it died")

        def report_hosts(self):
            pass

    replica, reports = replica_of(monkeypatch, Ends())
    assert replica({"shard": [1, 0]})["kind"] == ["ReplicaReleased", "HostError"]
    assert reports[-1].errors == {"HostError": 1}
    assert reports[-1].shards == {"released": 1, "failed": 1}
