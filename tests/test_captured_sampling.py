"""Games solved by graphs of a fixed number of steps, as on a GPU: the answers of the solver that checks each step."""

from __future__ import annotations

import pytest
import torch
from support.decoding import config_of
from support.sampling_hosts import FOUR, PAIR, LoneHost, assert_same, config_of_lone_host, watch_graphs

import cage
from cage.rule_names import RuleName
from pipeline.errors import HostOutOfMemory, StateLost
from pipeline.principals.kinds import KINDS
from pipeline.protocol.messages import DRAWN, Admission, Position, Step, Terms
from pipeline.protocol.specs import GameSpec
from pipeline.protocol.topology import PrincipalPlan
from pipeline.worker import captured_sampling
from pipeline.worker.captured_sampling import CapturedSampling
from pipeline.worker.hosts import PositionGuard
from pipeline.worker.sampling_host import PendingOutcomes
from pipeline.worker.stopwatch import Stopwatch

TERMS = Terms(RuleName.EQUILIBRIUM, 0.3, (0.7, 0.4))
TERMS_COLD = Terms(RuleName.EQUILIBRIUM, 0.02, (0.7, 0.4))
FIRST = Position(0, 5, 0)


def both(tiny, principals, **decoding):
    """Two hosts of the same run: one whose solver checks each step, and one that captures."""
    config = config_of_lone_host(tiny(), principals, **decoding)
    return LoneHost.start(config, captures=False), LoneHost.start(config, captures=True)


def capturing(tiny, **decoding):
    return LoneHost.start(config_of_lone_host(tiny(), PAIR, **decoding), captures=True)


def captured_after(lone, *slots):
    """Games of the host's runner, with a prompt read in each of these slots."""
    admissions = [Admission(slot, lone.prompts(*range(1, slot + 4))) for slot in slots]
    lone.runner.advance(Step(admissions))
    return CapturedSampling(lone.runner, lone.assembly.hosts[0].roles, lone.games)


def first_step(lone):
    """The step that begins a row in slot 0."""
    return Step([Admission(0, lone.prompts(1, 2, 3))])


@pytest.mark.parametrize("decoding", [{}, {"min_p": 0.05, "top_p": 0.9}, {"temperature": 0}, {"candidates": 7}])
@pytest.mark.parametrize("num_principals", [1, 2, 4])
def test_answers_are_those_of_the_solver_that_checks(tiny, monkeypatch, num_principals, decoding):
    principals = dict(list(FOUR.items())[:num_principals])
    checking, lone = both(tiny, principals, max_new_tokens=9, **decoding)
    graphs = watch_graphs(monkeypatch)
    expected = checking.decode()
    assert not graphs
    assert_same(expected, lone.decode())
    assert graphs.count("games") >= max(record.num_tokens for record in expected.values())


@pytest.mark.parametrize("principals", [PAIR, FOUR], ids=["two", "four"])
@pytest.mark.parametrize("ladder", [(1, 2, 60), (1, 2, 3), (60,)])
def test_games_that_need_more_steps_get_them_and_what_followed_is_computed_again(
    tiny, monkeypatch, ladder, principals
):
    checking, lone = both(tiny, principals, agent_temperature=0.05, max_new_tokens=9)
    monkeypatch.setattr(captured_sampling, "NUM_STEPS", ladder)
    monkeypatch.setattr(captured_sampling, "NUM_STEPS_OF_PATHS", ladder)
    before = [each.runner.num_forwards for each in (checking, lone)]
    assert_same(checking.decode(), lone.decode())
    expected, found = (each.runner.num_forwards - num for each, num in zip((checking, lone), before, strict=True))
    if principals is PAIR or ladder != (1, 2, 60):  # four may draw another token before the ladder's end
        assert (found > expected) == (ladder == (1, 2, 3))
    else:
        assert found >= expected


def test_a_shorter_graph_is_tried_again_when_it_had_been_enough_for_a_while(tiny, monkeypatch):
    monkeypatch.setattr(captured_sampling, "NUM_STEPS", (4, 40))
    monkeypatch.setattr(captured_sampling, "PATIENCE", 3)
    lone = capturing(tiny)
    lone.decode()  # whose last games need more than 4 steps where the agent is cold
    captured = CapturedSampling(lone.runner, lone.assembly.hosts[0].roles, lone.games)
    graphs = watch_graphs(monkeypatch)
    for agent_temperature in (0.02, 100.0, 100.0, 0.02, 100.0, 100.0, 100.0, 100.0):
        captured.begin([0], [Terms(RuleName.EQUILIBRIUM, agent_temperature, (0.7, 0.4))], [0.3])
        captured.settle()
    assert [name for name in graphs if name != "games"] == [4, 40, 40, 40, 40, 40, 40, 40, 4]


@pytest.mark.parametrize(
    ("num_principals", "rules", "candidates", "serves"),
    [
        (0, ["equilibrium"], 50, False),
        (1, ["equilibrium"], 50, True),
        (2, ["equilibrium"], "all", True),
        (3, ["equilibrium"], "all", False),
        (3, ["equilibrium"], 2000, False),
        (8, ["equilibrium"], 1024, True),
        (9, ["equilibrium"], 50, False),
        (2, ["linear"], 50, False),
        (2, ["equilibrium", "linear"], 50, False),  # what solves a row must not depend on the others of the step
    ],
)
def test_a_run_is_captured_if_all_of_its_games_can_be(num_principals, rules, candidates, serves):
    section = KINDS["prompted"](kind="prompted", principle="be kind")
    principals = tuple(
        PrincipalPlan(str(at), 1.0, section, {"tuned": str(at), "reference": "base"}) for at in range(num_principals)
    )
    sampling = config_of("m", decoding={"candidates": candidates}).decoding.sampling
    games = GameSpec(sampling, principals, frozenset(map(RuleName, rules)))
    assert CapturedSampling.serves(games) == serves


def test_a_step_that_is_asked_for_again_is_sampled_again_and_nothing_else(tiny, monkeypatch):
    """Also where its games need more steps than were taken at first."""
    monkeypatch.setattr(captured_sampling, "NUM_STEPS", (1, 2, 3))
    lone = capturing(tiny, agent_temperature=0.02)

    def sampled(repeats, group):
        outcomes = []
        at, step = Position(group, 5, 0), first_step(lone)
        for token in range(8):
            for _ in range(repeats):
                reply = lone.host.advance_and_sample(at, step, [0], [TERMS_COLD], [0.1 * token])
            outcomes.append(reply.result())
            at, step = at.after, Step((), [0], [DRAWN])
        return outcomes

    assert sampled(3, 0) == sampled(1, 1)


def out_of_memory(self):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_outcome_that_finds_no_memory_makes_the_host_forget(tiny, monkeypatch):
    lone = capturing(tiny)
    reply = lone.host.advance_and_sample(FIRST, first_step(lone), [0], [TERMS], [0.1])
    with monkeypatch.context() as patch:
        patch.setattr(CapturedSampling, "settle", out_of_memory)
        with pytest.raises(HostOutOfMemory):
            reply.result()
    with pytest.raises(StateLost):
        lone.host.advance_and_sample(FIRST.after, Step((), [0], [DRAWN]), [0], [TERMS], [0.1])
    again = lone.host.advance_and_sample(Position(0, 6, 0), first_step(lone), [0], [TERMS], [0.1])
    assert len(again.result()) == 1


def test_an_outcome_that_fails_while_the_next_step_begins_fails_for_both_steps(tiny, monkeypatch):
    """The next step finds out first; whoever waits for the earlier one gets the same error."""
    lone = capturing(tiny)
    first = lone.host.advance_and_sample(FIRST, first_step(lone), [0], [TERMS], [0.1])
    monkeypatch.setattr(CapturedSampling, "settle", out_of_memory)
    with pytest.raises(HostOutOfMemory):
        lone.host.advance_and_sample(FIRST.after, Step((), [0], [DRAWN]), [0], [TERMS], [0.1])
    for _ in range(2):
        with pytest.raises(HostOutOfMemory):
            first.result()


def test_a_row_whose_numbers_are_not_finite_is_not_tried_again(tiny, monkeypatch):
    lone = capturing(tiny)
    captured = captured_after(lone, 0, 1)
    graphs = watch_graphs(monkeypatch)
    with torch.inference_mode():
        lone.runner.slot_logits[1, 0] = torch.nan  # of slot 1, for the base
    captured.begin([0, 1], [TERMS] * 2, [0.3, 0.4])
    outcomes, is_other = captured.settle()
    assert [outcome.status for outcome in outcomes] == [cage.Status.CONVERGED, cage.Status.NOT_FINITE]
    assert graphs == ["games", captured_sampling.NUM_STEPS[0]]
    assert not is_other


def test_an_outcome_may_be_waited_for_late_and_twice_and_other_slots_keep_their_tokens(tiny):
    lone = capturing(tiny)
    captured = captured_after(lone, 0, 2)
    with torch.inference_mode():
        lone.runner.newest_S[:] = 999
    captured.begin([0, 2], [TERMS] * 2, [0.1, 0.9])
    device = lone.runner.device
    pending = PendingOutcomes(captured, PositionGuard(device), Stopwatch(device), FIRST, lambda: None)
    assert pending.wait() is pending.wait()
    assert pending.settle() is False
    tokens = [outcome.token_id for outcome in pending.wait()]
    assert lone.runner.newest_S.tolist() == [tokens[0], 999, tokens[1], 999]
