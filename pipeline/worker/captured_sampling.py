"""Games and draws of all slots as captured CUDA graphs, for a GPU that holds every role.

Nothing in a graph waits for the CPU. So a graph takes a fixed number of solver steps, and whether they were enough is
seen when the tokens are read, which may be while the next pass runs. If not, the same games are solved by a graph
with more steps; what even the longest one leaves unsolved, by the solver that checks convergence. A row's bits do not
depend on which of them solved it.

Lanes of proposed tokens count as slots.

S slots, J principals, R roles, K candidates, C columns of a sampled step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cage
from cage.newton import ALWAYS_UNIQUE
from pipeline.attention.transfers import to_device
from pipeline.protocol.messages import Candidates, Terms, TokenOutcome
from pipeline.protocol.specs import GameSpec, SamplingOptions
from pipeline.protocol.topology import HostRole, PrincipalPlan
from pipeline.sampling.games import (
    FLOAT64_CANDIDATES,
    SampledStep,
    SolvedStep,
    as_game,
    by_role,
    sample,
    solve_and_sample,
    token_rewards,
)
from pipeline.sampling.proposals import propose_from
from pipeline.worker.compiled_layers import of_many_shapes
from pipeline.worker.cuda_graphs import GraphPool
from pipeline.worker.language_model_runner import LanguageModelRunner

# solver steps of the graphs, shortest first; with three principals and more the solver follows a path
NUM_STEPS = (12, 20, 40)
NUM_STEPS_OF_PATHS = (16, 24, 32, 64, 128)
MOST_PRINCIPALS = 8  # a step of the path solves a linear system, which is unrolled
PATIENCE = 64  # steps after which a shorter graph is tried again, if it would have been enough for all of them


@dataclass(frozen=True, slots=True)
class _Games:
    """The candidates of all slots, the base over them, and their rewards: enough to solve the games again."""

    proposal: Candidates
    base_SK: Tensor
    rewards_SJK: Tensor


@dataclass(frozen=True, slots=True)
class _Request:
    """What `begin` was called with."""

    slots: Sequence[int]
    terms: Sequence[Terms]
    uniforms: Sequence[float]


class CapturedSampling:
    """Solves and samples for the slots of a runner. The device writes the drawn tokens to the runner's `newest_S`.

    Args:
        runner: holds every role.
        roles: its roles, the base's first.
        games: candidates, draws and principals.
    """

    def __init__(self, runner: LanguageModelRunner, roles: Sequence[HostRole], games: GameSpec) -> None:
        self._runner = runner
        self._roles = roles
        self._options = games.sampling
        self._principals = games.principals
        self._on_gpu = runner.device.type == "cuda"
        # by slot: uniform draw, agent temperature, weights; a draw below 0 marks a slot that gets no token
        neutral = [[-1.0, 1.0, *([0.0] * len(games.principals))]] * len(runner.newest_S)
        self._neutral = neutral
        self._inputs = torch.tensor(neutral, dtype=torch.float64, device=runner.device)
        self._read_games = torch.compile(read_games, dynamic=False) if self._on_gpu else read_games
        self._sample = torch.compile(sample, dynamic=False) if self._on_gpu else sample
        self._graphs = GraphPool(runner.device, "games")
        self._games: _Games | None = None
        self._step_counts = NUM_STEPS if len(games.principals) <= ALWAYS_UNIQUE else NUM_STEPS_OF_PATHS
        self._current = 0  # which of these numbers of steps the graph in use has
        self._num_enough = 0  # steps in succession for which the next shorter graph would have been enough
        self._request: _Request | None = None
        self._numbers: tuple[Tensor, torch.cuda.Event | None] | None = None

    @staticmethod
    def serves(games: GameSpec) -> bool:
        """Whether graphs can solve all games of a run: the way a row is solved must not depend on the batch."""
        if not games.draws_alike or not all(rule.has_fixed_step_solver for rule in games.rules):
            return False
        count = games.sampling.num_candidates
        is_whole = count is None or count > FLOAT64_CANDIDATES
        # a path over so many tokens takes longer than pooling them and checking convergence
        return 0 < len(games.principals) <= (ALWAYS_UNIQUE if is_whole else MOST_PRINCIPALS)

    @torch.inference_mode()
    def begin(self, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]) -> None:
        """Start to solve and sample for these slots at their newest logits, which may change afterwards.

        Args:
            slots: that get a token.
            terms: rule, agent temperature and weights of each.
            uniforms: the uniform draw of each.
        """
        assert self._request is None
        rows = list(self._neutral)
        for slot, each, uniform in zip(slots, terms, uniforms, strict=True):
            rows[slot] = [uniform, each.agent_temperature, *each.weights]
        self._inputs.copy_(to_device(rows, self._runner.device, torch.float64), non_blocking=True)
        # copies what it needs of the logits: behind it the next pass may overwrite them
        self._games = self._graphs.run("games", self._read_logits)
        self._launch()
        self._request = _Request(slots, terms, uniforms)

    @torch.inference_mode()
    def settle(self) -> tuple[list[TokenOutcome], bool]:
        """Wait for the outcomes of the last `begin`; solve again what needs more steps.

        Returns:
            The outcome of each slot, and whether a token differs from the one that was in `newest_S` so far.
        """
        request, self._request = self._request, None
        assert request is not None
        first = numbers_SC = self._wait()
        slots = list(request.slots)
        while self._unsolved(numbers_SC, slots) and self._current + 1 < len(self._step_counts):
            self._current += 1
            self._launch()
            numbers_SC = self._wait()
        if unsolved := self._unsolved(numbers_SC, slots):
            numbers_SC = self._finish(numbers_SC, request, unsolved)
        self._step_down(int(numbers_SC[slots, SampledStep.NUM_STEPS].max()))
        is_other = bool((numbers_SC[slots, 0] != first[slots, 0]).any())
        if is_other:
            self._runner.newest_S[slots] = numbers_SC[slots, 0].long().to(self._runner.device)
        return SampledStep(numbers_SC[slots]).outcomes(request.terms), is_other

    def _step_down(self, num_steps: int) -> None:
        """Take the next shorter graph once it would have been enough for PATIENCE steps in succession.

        A longer graph than needed costs a little time in every step, one that is too short may cost a whole pass.
        """
        self._num_enough = (
            self._num_enough + 1 if self._current and num_steps <= self._step_counts[self._current - 1] else 0
        )
        if self._num_enough == PATIENCE:
            self._current, self._num_enough = self._current - 1, 0

    def _launch(self) -> None:
        """Solve with the steps of the current graph, and begin to copy the outcome to the CPU."""
        numbers_SC = self._graphs.run(self._step_counts[self._current], self._solve)
        newest_S = self._runner.newest_S
        newest_S.copy_(torch.where(self._inputs[:, 0] < 0, newest_S, numbers_SC[:, 0].long()))
        if not self._on_gpu:
            self._numbers = numbers_SC, None
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        on_host = torch.empty(numbers_SC.shape, dtype=torch.float64, pin_memory=True)
        on_host.copy_(numbers_SC, non_blocking=True)
        event.record()
        self._numbers = on_host, event

    @of_many_shapes()
    def _read_logits(self) -> _Games:
        runner = self._runner
        return self._read_games(runner.slot_logits, runner.vocab_size, self._roles, self._options, self._principals)

    @of_many_shapes()
    def _solve(self) -> Tensor:
        """Solve and draw with the steps of the current graph; does not wait for the device."""
        assert self._games is not None
        base_SK, rewards_SJK = self._games.base_SK, self._games.rewards_SJK
        numbers = self._inputs.to(base_SK.dtype)
        temperature_S1, weights_SJ = numbers[:, 1:2], numbers[:, 2:]
        values_SJK = weights_SJ[..., None] * rewards_SJK
        # in units of the agent temperature: the solver reads a temperature per row on the CPU, which would wait
        scaled = cage.Game(base_SK, values_SJK / temperature_S1[..., None], 1.0)
        solution = cage.FixedStepNewton(self._step_counts[self._current], compiles=self._on_gpu).solve(scaled)
        decision = cage.rules.Decision(
            solution.log_policy,
            solution.thresholds * temperature_S1,
            solution.residual,
            solution.status,
            solution.num_steps,
        )
        game = cage.Game(base_SK, values_SJK, 1.0)
        solved = SolvedStep(game, rewards_SJK, decision)
        return self._sample(self._options, self._games.proposal, solved, self._inputs[:, 0]).numbers_BC

    def _wait(self) -> Tensor:
        assert self._numbers is not None
        numbers_SC, event = self._numbers
        if event is not None:
            event.synchronize()
        return numbers_SC

    def _unsolved(self, numbers_SC: Tensor, slots: Sequence[int]) -> list[int]:
        """Indices of the slots whose game needs more steps."""
        return (numbers_SC[slots, SampledStep.STATUS] == cage.Status.MAX_STEPS).nonzero()[:, 0].tolist()

    def _finish(self, numbers_SC: Tensor, request: _Request, places: Sequence[int]) -> Tensor:
        """Solve some rows again by the solver that checks convergence.

        One by one, as on a GPU the last bits depend on the number of rows.
        """
        assert self._games is not None
        numbers_SC = numbers_SC.clone()
        for place in places:
            at = [request.slots[place]]
            rewards_1JK = self._games.rewards_SJK[at]
            sampled = solve_and_sample(
                self._options,
                self._games.proposal.rows(at),
                rewards_1JK.unbind(1),
                [request.terms[place]],
                [request.uniforms[place]],
            )
            numbers_SC[at] = sampled.numbers_BC.cpu()
        return numbers_SC


def read_games(
    logits_SRV: Tensor,
    vocab_size: int,
    roles: Sequence[HostRole],
    options: SamplingOptions,
    principals: Sequence[PrincipalPlan],
) -> _Games:
    """The games of all slots; does not wait for the device."""
    proposal = propose_from(logits_SRV, vocab_size, num_candidates=options.num_candidates, min_p=options.min_p)
    rewards = token_rewards(principals, by_role(roles, proposal.role_logprobs_BRK))
    return _Games(proposal, *as_game(proposal, rewards))
