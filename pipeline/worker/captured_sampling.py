"""Games and draws of all slots as one recording, for a GPU that holds every role: nothing in it waits for the host.

A recording takes a fixed number of the solver's steps. Whether that was enough is seen when the tokens are read,
which may be while the next pass runs; if not, the same games are played by a recording with more steps, and what even
the longest one leaves unsolved by the solver that looks. A row's bits do not depend on which recording solved it.

S slots, J principals, R roles, K candidates, C columns of what is played.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cage
from cage.newton import ALWAYS_UNIQUE
from pipeline.attention.transfers import to_device
from pipeline.config.sections import DecodingConfig, RuleName
from pipeline.engine.row_state import Terms, TokenOutcome
from pipeline.protocol.messages import Candidates, HostRole
from pipeline.runtime.topology import PrincipalPlan
from pipeline.sampling.games import (
    FLOAT64_CANDIDATES,
    Played,
    as_game,
    by_role,
    drawn,
    num_candidates,
    play,
    token_rewards,
)
from pipeline.worker.compiled_layers import of_many_shapes
from pipeline.worker.cuda_graphs import GraphPool
from pipeline.worker.language_model_runner import Host, propose_from

# of the solver, by recording; three principals and more follow a path
NUM_STEPS = (12, 20, 40)
NUM_STEPS_OF_PATHS = (16, 24, 32, 64, 128)
MOST_PRINCIPALS = 8  # a step of the path solves a linear system, all of it unrolled
CALM = 64  # played games after which a shorter recording is tried again, if it had been enough for all of them


@dataclass(frozen=True, slots=True)
class _Games:
    """The candidates of all slots, the base over them, and what they are worth: it takes no more to play again."""

    proposal: Candidates
    base_SK: Tensor
    rewards_SJK: Tensor


@dataclass(frozen=True, slots=True)
class _Asked:
    slots: Sequence[int]
    terms: Sequence[Terms]
    uniforms: Sequence[float]


class CapturedSampling:
    """Plays the games of a host's slots. The drawn tokens are the host's `newest_S` at once.

    Args:
        host: holds every role.
        roles: its roles, the base's first.
        decoding: candidates and draws.
        principals: all of the run's.
    """

    def __init__(
        self,
        host: Host,
        roles: Sequence[HostRole],
        decoding: DecodingConfig,
        principals: Sequence[PrincipalPlan],
    ) -> None:
        self._host = host
        self._roles = roles
        self._decoding = decoding
        self._principals = principals
        self._on_gpu = host.device.type == "cuda"
        # by slot: uniform draw, agent temperature, weights; a draw below 0 is of a slot that nobody asks for
        neutral = [[-1.0, 1.0, *([0.0] * len(principals))]] * host.num_slots
        self._neutral = neutral
        self._inputs = torch.tensor(neutral, dtype=torch.float64, device=host.device)
        self._read_games = torch.compile(read_games, dynamic=False) if self._on_gpu else read_games
        self._draw = torch.compile(drawn, dynamic=False) if self._on_gpu else drawn
        self._recorder = GraphPool(host.device, "games")
        self._games: _Games | None = None
        self._ladder = NUM_STEPS if len(principals) <= ALWAYS_UNIQUE else NUM_STEPS_OF_PATHS
        self._rung = self._num_calm = 0
        self._asked: _Asked | None = None
        self._answer: tuple[Tensor, torch.cuda.Event | None] | None = None

    @staticmethod
    def serves(principals: Sequence[PrincipalPlan], rules: Collection[RuleName], decoding: DecodingConfig) -> bool:
        """Whether a recording can play all games of a run: who plays a row's must not depend on its company."""
        if set(rules) != {RuleName.EQUILIBRIUM}:
            return False
        count = num_candidates(decoding)
        is_whole = count is None or count > FLOAT64_CANDIDATES
        # a path over so many takes more than pooling them and looking
        return 0 < len(principals) <= (ALWAYS_UNIQUE if is_whole else MOST_PRINCIPALS)

    @torch.inference_mode()
    def begin(self, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]) -> None:
        """Play for these slots at their newest logits. What was begun before has to be settled."""
        assert self._asked is None
        rows = list(self._neutral)
        for slot, each, uniform in zip(slots, terms, uniforms, strict=True):
            rows[slot] = [uniform, each.agent_temperature, *each.weights]
        self._inputs.copy_(to_device(rows, self._host.device, torch.float64), non_blocking=True)
        # from here on the logits may change
        self._games = self._recorder.run("games", self._read_logits)
        self._launch()
        self._asked = _Asked(slots, terms, uniforms)

    @torch.inference_mode()
    def settle(self) -> tuple[list[TokenOutcome], bool]:
        """The outcomes of what was begun, and whether a token is not the one that was in `newest_S` so far."""
        asked, self._asked = self._asked, None
        assert asked is not None
        first = numbers_SC = self._wait()
        slots = list(asked.slots)
        while self._unsolved(numbers_SC, slots) and self._rung + 1 < len(self._ladder):
            self._rung += 1
            self._launch()
            numbers_SC = self._wait()
        if unsolved := self._unsolved(numbers_SC, slots):
            numbers_SC = self._finish(numbers_SC, asked, unsolved)
        self._step_down(int(numbers_SC[slots, Played.NUM_STEPS].max()))
        is_other = bool((numbers_SC[slots, 0] != first[slots, 0]).any())
        if is_other:
            self._host.newest_S[slots] = numbers_SC[slots, 0].long().to(self._host.device)
        return Played(numbers_SC[slots]).outcomes(asked.terms), is_other

    def _step_down(self, num_steps: int) -> None:
        """Take a shorter recording if it had been enough for a while: a token that it gets wrong costs a pass."""
        self._num_calm = self._num_calm + 1 if self._rung and num_steps <= self._ladder[self._rung - 1] else 0
        if self._num_calm == CALM:
            self._rung, self._num_calm = self._rung - 1, 0

    def _launch(self) -> None:
        """Play with as many steps as the present recording has, and begin to read the outcome."""
        numbers_SC = self._recorder.run(self._ladder[self._rung], self._play)
        newest_S = self._host.newest_S
        newest_S.copy_(torch.where(self._inputs[:, 0] < 0, newest_S, numbers_SC[:, 0].long()))
        if not self._on_gpu:
            self._answer = numbers_SC, None
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        on_host = torch.empty(numbers_SC.shape, dtype=torch.float64, pin_memory=True)
        on_host.copy_(numbers_SC, non_blocking=True)
        event.record()
        self._answer = on_host, event

    @of_many_shapes()
    def _read_logits(self) -> _Games:
        host = self._host
        return self._read_games(host.slot_logits, host.vocab_size, self._roles, self._decoding, self._principals)

    @of_many_shapes()
    def _play(self) -> Tensor:
        """Solve and draw with the steps of the present recording; asks the device nothing."""
        assert self._games is not None
        base_SK, rewards_SJK = self._games.base_SK, self._games.rewards_SJK
        numbers = self._inputs.to(base_SK.dtype)
        temperature_S1, weights_SJ = numbers[:, 1:2], numbers[:, 2:]
        values_SJK = weights_SJ[..., None] * rewards_SJK
        # in units of the agent temperature: a temperature by row would be looked at
        scaled = cage.Game(base_SK, values_SJK / temperature_S1[..., None], 1.0)
        solution = cage.FixedStepNewton(self._ladder[self._rung], compiles=self._on_gpu).solve(scaled)
        decision = cage.rules.Decision(
            solution.log_policy,
            solution.thresholds * temperature_S1,
            solution.residual,
            solution.status,
            solution.num_steps,
        )
        game = cage.Game(base_SK, values_SJK, 1.0)
        return self._draw(
            self._decoding, self._games.proposal, game, rewards_SJK, decision, self._inputs[:, 0]
        ).numbers_BC

    def _wait(self) -> Tensor:
        assert self._answer is not None
        numbers_SC, event = self._answer
        if event is not None:
            event.synchronize()
        return numbers_SC

    def _unsolved(self, numbers_SC: Tensor, slots: Sequence[int]) -> list[int]:
        """Places among the slots whose game needs more steps."""
        return (numbers_SC[slots, Played.STATUS] == cage.Status.MAX_STEPS).nonzero()[:, 0].tolist()

    def _finish(self, numbers_SC: Tensor, asked: _Asked, places: Sequence[int]) -> Tensor:
        """Play some rows once more, without limit; one by one, as a GPU's last bits depend on how many there are."""
        assert self._games is not None
        numbers_SC = numbers_SC.clone()
        for place in places:
            at = [asked.slots[place]]
            rewards_1JK = self._games.rewards_SJK[at]
            played = play(
                self._decoding,
                self._games.proposal.rows(at),
                rewards_1JK.unbind(1),
                [asked.terms[place]],
                [asked.uniforms[place]],
            )
            numbers_SC[at] = played.numbers_BC.cpu()
        return numbers_SC


def read_games(
    logits_SRV: Tensor,
    vocab_size: int,
    roles: Sequence[HostRole],
    decoding: DecodingConfig,
    principals: Sequence[PrincipalPlan],
) -> _Games:
    """The games of all slots; asks the device nothing."""
    proposal = propose_from(logits_SRV, vocab_size, num_candidates=num_candidates(decoding), min_p=decoding.min_p)
    rewards = token_rewards(principals, by_role(roles, proposal.role_logprobs_BRK))
    return _Games(proposal, *as_game(proposal, rewards))
