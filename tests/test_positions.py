"""A host knows where its rows are: a repeated call computes nothing, one from elsewhere is refused."""

from __future__ import annotations

import pytest
import torch
from support.unreliable import Replica, nothing

from cage.rule_names import RuleName
from pipeline.errors import HostOutOfMemory, StateLost
from pipeline.protocol.messages import DRAWN, Admission, Position, Step, Terms
from pipeline.worker.hosts import LanguageModelHost


def guarded(tiny):
    """A host whose group 0 is nowhere yet, its runner, and the admission of a row."""
    replica = Replica(tiny, slots=2)
    runner = replica.runners["arm"]
    (role,) = replica.plans["arm"].roles
    return LanguageModelHost(runner), runner, [Admission(0, {role.name: [1, 2, 3]})]


def test_a_repeated_step_gives_the_same_values_without_computing_again(tiny):
    host, runner, admissions = guarded(tiny)
    at = Position(0, 77, 0)
    host.advance(at, Step(admissions))
    host.advance(at.after, Step(slots=[0], tokens=[5]))
    first, forwards = host.values_at(at.after, [0], [1], None), runner.num_forwards
    host.advance(at.after, Step(slots=[0], tokens=[5]))
    assert torch.equal(host.values_at(at.after, [0], [1], None), first)
    assert runner.num_forwards == forwards


def lone_host(tiny):
    """A host that samples, and prompts of its roles."""
    replica = Replica(tiny, slots=2, runs_ahead=True)
    return replica.hosts(nothing).sampler.inner.host, {role.name: [1, 2, 3] for role in replica.plans["base"].roles}


def test_a_repeated_step_of_a_lone_host_draws_the_same_token_and_goes_on_from_it(tiny):
    host, prompts = lone_host(tiny)
    terms = [Terms(RuleName.EQUILIBRIUM, 0.5, (0.7,))]
    at = Position(0, 77, 0)
    host.advance_and_sample(at, Step([Admission(0, prompts)]), [0], terms, [0.3])
    later = [host.advance_and_sample(at.after, Step((), [0], [DRAWN]), [0], terms, [0.6]).result() for _ in range(3)]
    assert later[0] == later[1] == later[2]
    other = host.advance_and_sample(Position(1, 77, 0), Step([Admission(1, prompts)]), [1], terms, [0.3]).result()
    [token] = [outcome.token_id for outcome in other]
    again = host.advance_and_sample(Position(1, 77, 1), Step((), [1], [token]), [1], terms, [0.6]).result()
    assert again == later[0]
    host.resize(2)
    with pytest.raises(StateLost):
        host.advance_and_sample(at.after.after, Step((), [0], [DRAWN]), [0], terms, [0.6])


ELSEWHERE = [Position(0, 77, 0), Position(0, 77, 2), Position(0, 78, 1), Position(1, 77, 1)]


@pytest.mark.parametrize("wrong", ELSEWHERE)
def test_a_host_elsewhere_refuses_to_answer_and_to_go_on(tiny, wrong):
    host, _, admissions = guarded(tiny)
    at = Position(0, 77, 0)
    host.advance(at, Step(admissions))
    host.advance(at.after, Step(slots=[0], tokens=[5]))
    further = Position(wrong.group, wrong.epoch, wrong.step + 3)
    with pytest.raises(StateLost):
        host.values_at(wrong, [0], [1], None)
    with pytest.raises(StateLost):
        host.advance_and_propose(further, Step(slots=[0], tokens=[5]), [0], num_candidates=3, min_p=0)
    with pytest.raises(StateLost):
        host.advance(further, Step(slots=[0], tokens=[5]))
    # whatever was refused, the host is where it was
    assert host.values_at(at.after, [0], [1], None).isfinite().all()


@pytest.mark.parametrize("wrong", ELSEWHERE)
def test_a_lone_host_elsewhere_refuses_to_sample_and_to_go_on(tiny, wrong):
    host, prompts = lone_host(tiny)
    terms = [Terms(RuleName.EQUILIBRIUM, 0.5, (0.7,))]
    at = Position(0, 77, 0)
    host.advance_and_sample(at, Step([Admission(0, prompts)]), [0], terms, [0.3])
    host.advance_and_sample(at.after, Step((), [0], [DRAWN]), [0], terms, [0.6])
    with pytest.raises(StateLost):
        host.sample(wrong, [0], terms, [0.6])
    further = Position(wrong.group, wrong.epoch, wrong.step + 3)
    with pytest.raises(StateLost):
        host.advance_and_sample(further, Step((), [0], [DRAWN]), [0], terms, [0.6])


def test_a_call_that_fails_half_way_leaves_no_state_to_go_on_from(tiny):
    host, runner, admissions = guarded(tiny)
    at = Position(0, 77, 0)
    host.advance(at, Step(admissions))
    runner.advance = lambda step: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(HostOutOfMemory):
        host.advance(at.after, Step(slots=[0], tokens=[5]))
    del runner.advance
    for step in (at, at.after):
        with pytest.raises(StateLost):
            host.values_at(step, [0], [1], None)
