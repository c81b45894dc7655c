"""Hosts in actors whose devices go on by themselves, as GPUs do: the next step comes before the last one's answer."""

from __future__ import annotations

import sys

import pytest
import ray
from support.decoding import NOWHERE, ask, config_of, decode
from support.families import make_family

from jobs.bench.coordination import measure
from pipeline.cluster.host_actors import KEPT_OUTCOMES, HostActor, RayHost, hosts_of
from pipeline.cluster.host_groups import one_replica
from pipeline.engine.engine import decode_rows
from pipeline.protocol.hosts import Hosts, Reply
from pipeline.protocol.messages import Position, Step
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import LocalSamplingHost
from pipeline.runtime.wiring import unwrapped
from pipeline.worker.loading import load_language_model
from pipeline.worker.sampling_host import CapturingHost

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
ROWS = [ask(f"r{at}", "tell me " * (at % 4) + "x" * (at + 1)) for at in range(9)]


def capturing_host(assembly):
    """A host whose games are captured, as on a GPU."""
    (spec,) = assembly.hosts
    return CapturingHost(load_language_model(spec).slot_runner, spec.roles, spec.games)


class CapturingActor(HostActor):
    """Lists what happens in it."""

    def __init__(self, config):
        super().__init__((None,), 0, unwrapped)
        self.serve_sampling(capturing_host(assemble(config, NOWHERE)))
        self._events = []

    def advance_and_sample(self, *args):
        ticket = super().advance_and_sample(*args)
        self._events.append(f"begin {ticket.number}")
        return ticket

    def collect(self, ticket):
        self._events.append(f"collect {ticket.number}")
        return super().collect(ticket)

    def events(self):
        return self._events


def records(assembly, hosts):
    return {record.row_id: record for record in decode_rows(make_engine(assembly, hosts), ROWS)}


def test_answers_of_a_device_that_goes_on_are_those_of_one_process(tiny):
    decoding = {"max_new_tokens": 18, "trace": "tokens", "agent_temperature": 0.2, "temperature": 1.2}
    config = config_of(tiny(), PAIR, decoding=decoding, cluster={"slots": 4})
    assembly = assemble(config, NOWHERE)
    (plan,) = assembly.topology.hosts
    here = LocalSamplingHost(capturing_host(assembly), plan)
    expected = records(assembly, Hosts.lone(here, runs_ahead=True))
    actor = ray.remote(CapturingActor).remote(config)
    assert records(assembly, hosts_of([RayHost([actor], plan, 60.0)])) == expected
    events = ray.get(actor.events.remote())
    collected = [event for event in events if event.startswith("collect")]
    behind = [
        number for number in range(len(collected))
        if f"begin {number + 1}" in events
        and events.index(f"begin {number + 1}") < events.index(f"collect {number}")
    ]  # fmt: skip
    assert len(collected) > 18
    assert len(behind) > 0.8 * len(collected)


def test_reasoning_that_is_left_alone_and_closed_is_that_of_one_process(tiny):
    """Rows whose next step depends on the token before are not sent ahead; the others are."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    thinking = {"markers": ["<think>", "</think>"], "steer": False, "max_tokens": 5}
    decoding = {"max_new_tokens": 22, "trace": "tokens", "agent_temperature": 0.2, "temperature": 1.2}
    base = {"model": str(tiny()), "chat_template": template}
    config = config_of(base, PAIR, decoding={**decoding, "thinking": thinking}, cluster={"slots": 4})
    assembly = assemble(config, NOWHERE)
    (plan,) = assembly.topology.hosts
    here = LocalSamplingHost(capturing_host(assembly), plan)
    expected = records(assembly, Hosts.lone(here, runs_ahead=True))
    assert all(record.num_reasoning_tokens == 5 + len("</think>") for record in expected.values())
    assert any(sum(record.payments.values()) > 0 for record in expected.values())
    actor = ray.remote(CapturingActor).remote(config)
    assert records(assembly, hosts_of([RayHost([actor], plan, 60.0)])) == expected


def test_a_mixture_of_experts_has_the_same_bits_over_ray_and_with_other_slots(tmp_path):
    folder = make_family(tmp_path, "qwen2_moe")

    def config(slots):
        decoding = {"max_new_tokens": 8, "trace": "tokens", "agent_temperature": 0.7, "candidates": "all"}
        return config_of(folder, PAIR, decoding=decoding, cluster={"slots": slots})

    expected = decode(config(3), ROWS)
    assembly = assemble(config(9), NOWHERE)
    with one_replica(assembly) as hosts:
        found = {record.row_id: record for record in decode_rows(make_engine(assembly, hosts), ROWS[::-1])}
    assert all(record.error is None for record in found.values())
    assert found == expected


def test_outcomes_that_nobody_collects_are_let_go():
    class Begun:
        """Samples: an outcome is never there at once."""

        def advance_and_sample(self, at, step, slots, terms, uniforms):
            return Reply(lambda: ["done"])

    actor = HostActor((None,), 0, unwrapped)
    actor.serve_sampling(Begun())
    tickets = [actor.advance_and_sample(Position(0, 7, at), Step(), [], [], []) for at in range(100)]
    for ticket in tickets[:-KEPT_OUTCOMES]:
        with pytest.raises(KeyError):
            actor.collect(ticket)
    assert [actor.collect(ticket) for ticket in tickets[-KEPT_OUTCOMES:]] == [["done"]] * KEPT_OUTCOMES
    assert 2 < KEPT_OUTCOMES < len(tickets)  # an engine waits for two at most


@pytest.mark.nightly
def test_coordination_is_measured_beside_hosts_that_never_wait():
    [cell] = measure([5.0], 1, 1, 4, 0.5, is_gpu=True)
    assert cell.device == "gpu"
    assert (cell.hosts, cell.replicas, cell.slots) == (1, 1, 4)
    assert 0 < cell.of_ideal < 1.1  # 4 tokens in 5 ms
    assert 0 < cell.tokens_per_s < 1.1 * 800
