"""Games that are played without looking, as a GPU's recordings are: the same answers as by the solver that looks."""

from __future__ import annotations

import functools
from functools import partial

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of

import cage
from cage import newton
from cage.elimination import eliminate, eliminate_by_entries
from pipeline.config.sections import RuleName
from pipeline.engine.engine import Engine, decode_rows
from pipeline.engine.row_state import Terms
from pipeline.errors import HostOutOfMemory, StateLost
from pipeline.protocol.clients import LocalHost
from pipeline.protocol.messages import DRAWN, Admission, Position, Step
from pipeline.runtime.assembly import assemble
from pipeline.runtime.topology import PrincipalPlan
from pipeline.worker import captured_sampling
from pipeline.worker.loading import load_host
from pipeline.worker.sampling_host import SamplingHost, UnderWay

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
FOUR = {
    **PAIR,
    "odd": {"kind": "prompted", "principle": "be odd", "weight": 0.5},
    "loud": {"kind": "prompted", "principle": "SHOUT", "weight": 0.3},
}
TERMS = Terms(RuleName.EQUILIBRIUM, 0.3, (0.7, 0.4))
TERMS_COLD = Terms(RuleName.EQUILIBRIUM, 0.02, (0.7, 0.4))
ROWS = [ask(f"r{at}", "tell me " * (at % 4) + "x" * (at + 1)) for at in range(9)]


def records(tiny, *, records_games, principals=PAIR, **decoding):
    """Decode with a lone host that is sent steps ahead; records by row, and the host."""
    options = {"max_new_tokens": 18, "trace": "tokens", "agent_temperature": 0.2, "temperature": 1.2, **decoding}
    config = config_of(tiny(), principals, decoding=options, cluster={"slots": 4})
    assembly = assemble(config, NOWHERE)
    (plan,) = assembly.topology.hosts
    host = SamplingHost(
        load_host(assembly.hosts[0]),
        plan.roles,
        config.decoding,
        assembly.topology.principals,
        records_games=records_games,
    )
    engine = Engine(
        assembly.topology, {"base": LocalHost(host, plan)}, assembly.prompter, config.decoding, assembly.variants,
        num_slots=4, runs_ahead=True,
    )  # fmt: skip
    return {record.row_id: record for record in decode_rows(engine, ROWS)}, host


def assert_same(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for row_id, record in one.items():
        twin = other[row_id]
        assert record.response == twin.response
        assert record.num_unsolved == twin.num_unsolved
        for token, same in zip(record.tokens, twin.tokens, strict=True):
            assert token.token_id == same.token_id
            for name in ("base_logprob", "logprob"):
                assert getattr(token, name) == pytest.approx(getattr(same, name), abs=tolerance)
            for name in ("payments", "thresholds"):
                assert getattr(token, name) == pytest.approx(getattr(same, name), abs=tolerance)
        assert record.max_residual <= 1e-4
        assert record.rewards == pytest.approx(twin.rewards, abs=20 * tolerance)


@pytest.mark.parametrize("decoding", [{}, {"min_p": 0.05, "top_p": 0.9}, {"temperature": 0}, {"candidates": 7}])
@pytest.mark.parametrize("num_principals", [1, 2, 4])
def test_answers_are_those_of_the_solver_that_looks(tiny, num_principals, decoding):
    principals = dict(list(FOUR.items())[:num_principals])
    expected, _ = records(tiny, records_games=False, principals=principals, **decoding)
    found, host = records(tiny, records_games=True, principals=principals, **decoding)
    assert_same(expected, found)
    assert host._recorded is not None


@pytest.mark.parametrize("principals", [PAIR, FOUR], ids=["two", "four"])
@pytest.mark.parametrize("ladder", [(1, 2, 60), (1, 2, 3), (60,)])
def test_games_that_need_more_steps_get_them_and_what_followed_is_computed_again(
    tiny, monkeypatch, ladder, principals
):
    again = []
    compute_again = SamplingHost._settle

    def watched(self, at):
        before = self._host.num_forwards
        compute_again(self, at)
        again.append(self._host.num_forwards - before)

    options = {"principals": principals, "agent_temperature": 0.05}
    expected, _ = records(tiny, records_games=False, **options)
    monkeypatch.setattr(captured_sampling, "NUM_STEPS", ladder)
    monkeypatch.setattr(captured_sampling, "NUM_STEPS_OF_PATHS", ladder)
    monkeypatch.setattr(SamplingHost, "_settle", watched)
    found, _ = records(tiny, records_games=True, **options)
    assert_same(expected, found)
    if principals is PAIR or ladder != (1, 2, 60):  # four may draw another token before the ladder's end
        assert bool(sum(again)) == (ladder == (1, 2, 3))


def test_a_shorter_recording_is_tried_again_when_it_had_been_enough_for_a_while(tiny, monkeypatch):
    monkeypatch.setattr(captured_sampling, "NUM_STEPS", (4, 40))
    monkeypatch.setattr(captured_sampling, "CALM", 3)
    _, host = records(tiny, records_games=True)
    lengths = []
    launch = captured_sampling.CapturedSampling._launch
    monkeypatch.setattr(
        captured_sampling.CapturedSampling,
        "_launch",
        lambda self: lengths.append(self._ladder[self._rung]) or launch(self),
    )
    recorded = host._recorded
    recorded._rung = 0
    for agent_temperature in (0.02, 100.0, 100.0, 0.02, 100.0, 100.0, 100.0, 100.0):
        recorded.begin([0], [Terms(RuleName.EQUILIBRIUM, agent_temperature, (0.7, 0.4))], [0.3])
        recorded.settle()
    assert lengths == [4, 40, 40, 40, 40, 40, 40, 40, 4]


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
        (2, ["equilibrium", "linear"], 50, False),  # who plays a row must not depend on the others of the step
    ],
)
def test_a_run_is_recorded_whose_games_all_can_be(num_principals, rules, candidates, serves):
    principals = [PrincipalPlan(str(at), 1.0, "base", None) for at in range(num_principals)]
    decoding = config_of("m", decoding={"candidates": candidates}).decoding
    rules = {RuleName(rule) for rule in rules}
    assert captured_sampling.CapturedSampling.serves(principals, rules, decoding) == serves


def test_a_step_that_is_asked_for_again_is_played_again_and_nothing_else(tiny, monkeypatch):
    """Also where its games need more steps than were taken at first."""
    monkeypatch.setattr(captured_sampling, "NUM_STEPS", (1, 2, 3))
    _, host = records(tiny, records_games=True, agent_temperature=0.02)
    roles = host._roles

    def played(repeats, group):
        outcomes = []
        at = Position(group, 5, 0)
        step = Step([Admission(0, {role.name: [1, 2, 3] for role in roles})])
        for token in range(8):
            for _ in range(repeats):
                pending = host.advance_and_sample(at, step, [0], [TERMS_COLD], [0.1 * token])
            outcomes.append(pending.wait())
            at, step = at.after, Step((), [0], [DRAWN])
        return outcomes

    assert played(3, 0) == played(1, 1)


def test_an_outcome_that_finds_no_memory_makes_the_host_forget(tiny, monkeypatch):
    _, host = records(tiny, records_games=True)
    at = Position(0, 5, 0)
    prompts = {role.name: [1, 2, 3] for role in host._roles}
    pending = host.advance_and_sample(at, Step([Admission(0, prompts)]), [0], [TERMS], [0.1])

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(captured_sampling.CapturedSampling, "_wait", fail)
        with pytest.raises(HostOutOfMemory):
            pending.wait()
    with pytest.raises(StateLost):
        host.advance_and_sample(at.after, Step((), [0], [DRAWN]), [0], [TERMS], [0.1])
    again = host.advance_and_sample(Position(0, 6, 0), Step([Admission(0, prompts)]), [0], [TERMS], [0.1])
    assert len(again.wait()) == 1


def test_an_outcome_that_fails_while_the_next_step_begins_fails_for_both_steps(tiny, monkeypatch):
    """The next step finds out first; whoever waits for the earlier one must be told the same."""
    _, host = records(tiny, records_games=True)
    at = Position(0, 5, 0)
    prompts = {role.name: [1, 2, 3] for role in host._roles}
    first = host.advance_and_sample(at, Step([Admission(0, prompts)]), [0], [TERMS], [0.1])

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captured_sampling.CapturedSampling, "_wait", fail)
    with pytest.raises(HostOutOfMemory):
        host.advance_and_sample(at.after, Step((), [0], [DRAWN]), [0], [TERMS], [0.1])
    for _ in range(2):
        with pytest.raises(HostOutOfMemory):
            first.wait()


def test_a_row_whose_numbers_are_not_finite_is_not_tried_again(tiny, monkeypatch):
    _, host = records(tiny, records_games=True)
    launches = []
    launch = captured_sampling.CapturedSampling._launch
    monkeypatch.setattr(
        captured_sampling.CapturedSampling, "_launch", lambda self: launches.append(0) or launch(self)
    )
    with torch.inference_mode():
        host._host._logits_RV[1] = torch.nan  # of slot 1, for the base
    host._recorded.begin([0, 1], [TERMS] * 2, [0.3, 0.4])
    outcomes, is_other = host._recorded.settle()
    assert [outcome.status for outcome in outcomes] == [cage.Status.CONVERGED, cage.Status.NOT_FINITE]
    assert len(launches) == 1
    assert not is_other


def test_an_outcome_may_be_waited_for_late_and_twice_and_other_slots_keep_their_tokens(tiny):
    _, host = records(tiny, records_games=True)
    with torch.inference_mode():
        host._host.newest_S[:] = 999
    host._recorded.begin([0, 2], [TERMS] * 2, [0.1, 0.9])
    pending = UnderWay(host, Position(0, 5, 0))
    assert pending.wait() is pending.wait()
    assert pending.settle() is False
    tokens = [outcome.token_id for outcome in pending.wait()]
    assert host._host.newest_S.tolist() == [tokens[0], 999, tokens[1], 999]


@pytest.mark.parametrize("num_principals", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blind_newton_finds_the_same_equilibrium(num_principals, dtype):
    torch.manual_seed(3)
    game = cage.Game(torch.randn(40, 60, dtype=dtype) * 2, torch.randn(40, num_principals, 60, dtype=dtype) * 4, 0.7)
    blind, looking = cage.FixedStepNewton(64).solve(game), cage.solve(game)
    assert (blind.status == cage.Status.CONVERGED).all()
    torch.testing.assert_close(blind.policy, looking.policy, atol=1e-9 if dtype is torch.float64 else 1e-6, rtol=0)
    few = cage.FixedStepNewton(2).solve(game)
    assert (few.status == cage.Status.MAX_STEPS).any() == bool(num_principals)


@pytest.mark.parametrize("num_principals", [2, 3, 6])
def test_blind_newton_compiles_as_a_whole(num_principals, monkeypatch):
    """Traced without a break, and with the system of equations solved entry by entry."""
    traced = partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(newton, "_compiled", functools.cache(lambda function, fusion: traced(function)))
    torch.manual_seed(5)
    game = cage.Game(
        torch.randn(20, 50, dtype=torch.float64) * 2, torch.randn(20, num_principals, 50, dtype=torch.float64), 0.2
    )
    torch._dynamo.utils.counters.clear()
    traced, plain = (cage.FixedStepNewton(40, compiles=compiles).solve(game) for compiles in (True, False))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # to begin, to step, to end
    torch._dynamo.reset()
    assert torch.equal(traced.status, plain.status)
    torch.testing.assert_close(traced.policy, plain.policy, atol=1e-9, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, when it is imported
@pytest.mark.parametrize("num_principals", [2, 3, 6])
def test_the_compiler_knows_the_options_it_is_given(num_principals):
    game = cage.Game(torch.zeros(1, 2), torch.zeros(1, num_principals, 2), 1.0)
    options = dict(newton._fusion(game))
    assert bool(options) == (num_principals > 2)
    torch.compile(torch.sin, options=options)  # refused at once if not


@pytest.mark.parametrize("num_principals", [2, 4])
@pytest.mark.parametrize("agent_temperature", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [6, 9, 12, 20])
def test_more_steps_change_no_bit_of_what_fewer_solved(num_steps, agent_temperature, num_principals):
    torch.manual_seed(4)
    base = torch.randn(400, 50, dtype=torch.float64) * 2
    game = cage.Game(base, torch.randn(400, num_principals, 50, dtype=torch.float64), agent_temperature)
    few, many = cage.FixedStepNewton(num_steps).solve(game), cage.FixedStepNewton(60).solve(game)
    solved = few.status == cage.Status.CONVERGED
    for name in ("log_policy", "thresholds", "residual", "num_steps"):
        assert torch.equal(getattr(few, name)[solved], getattr(many, name)[solved])


@pytest.mark.parametrize("num_principals", [2, 3])
def test_blind_newton_masks_what_cannot_be_drawn_and_reports_what_is_not_finite(num_principals):
    base = torch.zeros(3, 5, dtype=torch.float64)
    base[0, 2] = -torch.inf
    values = torch.randn(3, num_principals, 5, dtype=torch.float64)
    values[0, :, 2] = torch.nan
    values[1, 0, 1] = torch.inf
    game = cage.Game(base, values, 0.5)
    blind, looking = cage.FixedStepNewton(40).solve(game), cage.solve(game)
    assert blind.status.tolist() == looking.status.tolist()
    torch.testing.assert_close(blind.policy, looking.policy, equal_nan=True, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_unknowns", [3, 4, 8])
def test_elimination_by_entries_gives_the_bits_of_elimination(num_unknowns):
    torch.manual_seed(6)
    matrix = torch.randn(60, num_unknowns, num_unknowns, dtype=torch.float64)
    matrix[0, 1] = matrix[0, 0]  # singular
    matrix[3, 0, 0], matrix[3, 1, 0] = 9.0, -9.0  # as large, of another sign
    matrix[4, :, 1] = 0.0
    matrix[1, 0, 0] = 0.0
    matrix[2, 1, 1] = torch.nan
    right = torch.randn(60, num_unknowns, 2, dtype=torch.float64)
    for one, other in zip(eliminate(matrix, right), eliminate_by_entries(matrix, right), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
