"""The one place where engines are made: slots in two groups where that hides work, in one elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.decoding import NOWHERE, ask, config_of

from pipeline.cluster.host_actors import RayHost, hosts_of
from pipeline.engine.engine import decode_rows
from pipeline.protocol.hosts import Hosts
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import MIN_SLOTS_FOR_GROUPS, make_engine
from pipeline.runtime.local_hosts import start_hosts

FEW, ENOUGH = MIN_SLOTS_FOR_GROUPS - 1, MIN_SLOTS_FOR_GROUPS


class Watched:
    """The client of a host; keeps the group of every step."""

    def __init__(self, inner):
        self.inner, self.groups = inner, set()

    def __getattr__(self, method):
        call = getattr(self.inner, method)

        def run(at, *args, **options):
            self.groups.add(at.group)
            return call(at, *args, **options)

        return run


def decoded_with(tiny, slots, *, num_hosts, is_concurrent):
    """Records by id, and the groups in which the slots stepped."""
    arm = {"kind": "arm", "model": str(tiny(seed=5)), "reference": "none", "weight": 0.1}
    principals = {"kind": {"kind": "prompted", "principle": "be kind"}, **({"arm": arm} if num_hosts > 1 else {})}
    config = config_of(tiny(), principals, decoding={"max_new_tokens": 3, "draft": "off"}, cluster={"slots": slots})
    assembly = assemble(config, NOWHERE)
    hosts = start_hosts(assembly)
    assert not hosts.is_concurrent  # in one process nothing is
    base = Watched(hosts.base)
    if hosts.sampler is not None:
        watched = replace(Hosts.lone(base, runs_ahead=hosts.runs_ahead), is_concurrent=is_concurrent)
    else:
        watched = Hosts(base, hosts.others, is_concurrent=is_concurrent)
    engine = make_engine(assembly, watched)
    assert engine.num_slots == slots
    rows = [ask(f"r{at}", "why " * at + "?") for at in range(slots)]
    return {record.row_id: record for record in decode_rows(engine, rows)}, base.groups


@pytest.mark.parametrize(
    ("slots", "is_concurrent", "groups"),
    [(ENOUGH, True, {0, 1}), (ENOUGH, False, {0}), (FEW, True, {0}), (FEW, False, {0})],
)
def test_slots_are_in_two_groups_where_hosts_are_concurrent_and_slots_enough(tiny, slots, is_concurrent, groups):
    records, found = decoded_with(tiny, slots, num_hosts=2, is_concurrent=is_concurrent)
    assert found == groups
    assert records == decoded_with(tiny, slots, num_hosts=2, is_concurrent=False)[0]


def test_a_lone_host_steps_all_slots_at_once(tiny):
    _, groups = decoded_with(tiny, 2 * ENOUGH, num_hosts=1, is_concurrent=False)
    assert groups == {0}


def test_hosts_over_ray_are_concurrent_unless_there_is_one_which_runs_ahead():
    clients = [RayHost([None], None, 1.0) for _ in range(3)]
    assert hosts_of(clients) == Hosts(clients[0], tuple(clients[1:]), is_concurrent=True)
    assert hosts_of(clients[:1]) == Hosts.lone(clients[0], runs_ahead=True)
