"""Hosts in actors whose devices go on by themselves, as GPUs do: the next step comes before the last one's answer."""

from __future__ import annotations

import sys

import pytest
import ray
from support.decoding import NOWHERE, config_of
from test_recorded_games import PAIR, ROWS, records

from jobs.bench.coordination import measure
from pipeline.cluster.host_actors import HostActor, RayHost
from pipeline.engine.engine import Engine, decode_rows
from pipeline.protocol.clients import Pending
from pipeline.runtime.assembly import assemble
from pipeline.worker.loading import load_host
from pipeline.worker.sampling_host import SamplingHost

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests


class RecordingActor(HostActor):
    """Its host records games, as on a GPU; what happens is listed."""

    def __init__(self, config):
        super().__init__((None,), 0, lambda *_: None)
        assembly = assemble(config, NOWHERE)
        (plan,) = assembly.topology.hosts
        host, principals = load_host(assembly.hosts[0]), assembly.topology.principals
        self._host = SamplingHost(host, plan.roles, config.decoding, principals, records_games=True)
        self._events = []

    def call(self, method, *args, **kwargs):
        self._events.append(f"begin {self._num_tickets}")
        return super().call(method, *args, **kwargs)

    def collect(self, ticket):
        self._events.append(f"collect {ticket.number}")
        return super().collect(ticket)

    def events(self):
        return self._events


def test_answers_of_a_device_that_goes_on_are_those_of_one_process(tiny):
    expected, _ = records(tiny, records_games=True)
    decoding = {"max_new_tokens": 18, "trace": "tokens", "agent_temperature": 0.2, "temperature": 1.2}
    config = config_of(tiny(), PAIR, decoding=decoding, cluster={"slots": 4})
    assembly = assemble(config, NOWHERE)
    actor = ray.remote(RecordingActor).remote(config)
    engine = Engine(
        assembly.topology,
        {"base": RayHost(actor, assembly.topology.hosts[0], 60.0)},
        assembly.prompter,
        config.decoding,
        assembly.variants, num_slots=4, runs_ahead=True,
    )  # fmt: skip
    assert {record.row_id: record for record in decode_rows(engine, ROWS)} == expected
    events = ray.get(actor.events.remote())
    collected = [event for event in events if event.startswith("collect")]
    behind = [
        number for number in range(len(collected))
        if f"begin {number + 1}" in events
        and events.index(f"begin {number + 1}") < events.index(f"collect {number}")
    ]  # fmt: skip
    assert len(collected) > 18
    assert len(behind) > 0.8 * len(collected)


def test_answers_that_nobody_collects_are_let_go():
    class Begun(Pending):
        def wait(self):
            return "done"

    class Host:
        def begin(self):
            return Begun()

    actor = HostActor((None,), 0, lambda *_: None)
    actor._host = Host()
    tickets = [actor.call("begin") for _ in range(100)]
    assert len(actor._answers) == 16
    assert actor.collect(tickets[-1]) == "done"


def test_coordination_is_measured_beside_hosts_that_never_wait():
    [cell] = measure([5.0], 1, 1, 4, 0.5, is_gpu=True)
    assert cell.device == "gpu"
    assert (cell.hosts, cell.replicas, cell.slots) == (1, 1, 4)
    assert 0 < cell.of_ideal < 1.1  # 4 tokens in 5 ms
    assert 0 < cell.tokens_per_s < 1.1 * 800
