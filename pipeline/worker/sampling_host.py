"""A host that plays: where one host holds every role, candidates, values, games and draws stay on its device."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.attention.rows import can_build_for
from pipeline.config.sections import DecodingConfig
from pipeline.engine.row_state import Terms, TokenOutcome
from pipeline.errors import CageError, StateLost
from pipeline.points import Watcher, unwatched
from pipeline.protocol.clients import Pending
from pipeline.protocol.messages import DRAWN, HostRole, Position, Step
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.topology import PrincipalPlan
from pipeline.sampling.games import by_role, num_candidates, play, token_rewards
from pipeline.worker.captured_sampling import CapturedSampling
from pipeline.worker.hosts import PositionedHost
from pipeline.worker.language_model_runner import Host
from pipeline.worker.reward_loading import load_any_host
from pipeline.worker.reward_model_runner import RewardModelRunner
from pipeline.worker.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class HostWork:
    """What a host did since it was loaded: passes, tokens that went through them, seconds in passes and in games."""

    num_forwards: int
    num_tokens: int
    forward_s: float
    solve_s: float


class SamplingHost(PositionedHost):
    """A `PositionedHost` that can play the games of its rows.

    Games that are recorded are a GPU's work; their outcome may be read while the next pass runs.

    Args:
        host: the host.
        roles: its roles, the base's first.
        decoding: candidates and draws.
        principals: all of the run's; their roles must be this host's where `play` is called.
        watch: called at the points of a step, for tests.
        records_games: whether `CapturedSampling` plays.
    """

    def __init__(
        self,
        host: Host | RewardModelRunner,
        roles: Sequence[HostRole],
        decoding: DecodingConfig,
        principals: Sequence[PrincipalPlan],
        watch: Watcher = unwatched,
        *,
        records_games: bool = False,
    ) -> None:
        super().__init__(host, watch)
        self._roles = roles
        self._decoding = decoding
        self._principals = principals
        self._records_games = records_games
        self._watch_games = Stopwatch(host.device) if isinstance(host, Host) else None
        self._recorded: CapturedSampling | None = None
        self._under_way: UnderWay | None = None
        self._drawn: set[int] = set()  # slots whose newest token was drawn here

    @property
    def is_asynchronous(self) -> bool:
        """Whether it goes on with a step while the outcome of the one before is on its way."""
        return self._records_games

    def advance_and_sample(
        self,
        at: Position,
        step: Step,
        slots: Sequence[int],
        terms: Sequence[Terms],
        uniforms: Sequence[float],
    ) -> list[TokenOutcome] | Pending:
        """Bring the group to `at` and draw a token for each of these slots, in one call.

        Raises StateLost when the group is not one step before `at`, or a token of the step was not drawn here.
        """
        unknown = [
            slot
            for slot, token in zip(step.slots, step.tokens, strict=True)
            if token == DRAWN and slot not in self._drawn
        ]
        if unknown:
            raise StateLost(f"no token was drawn for the slots {', '.join(map(str, unknown))}")
        self.advance(at, step)
        self._settle(at)
        outcomes = self.play(at, slots, terms, uniforms)
        self._drawn |= set(slots)
        return outcomes

    def resize(self, num_slots: int) -> None:
        """Forget every row and make room for another number of them."""
        self._drawn.clear()
        self._under_way = self._recorded = None
        if self._records_games:
            gc.collect()  # recordings are let go before the new rows take their memory
        super().resize(num_slots)

    @torch.inference_mode()
    def play(
        self, at: Position, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> list[TokenOutcome] | Pending:
        """Draw a token for each slot at `at`. Raises StateLost when the group is elsewhere."""
        host, decoding = self._host, self._decoding
        assert isinstance(host, Host)
        assert self._watch_games is not None
        with self._watch_games.running():
            if self._records_games:
                self._check(at)
                if self._recorded is None:
                    self._recorded = CapturedSampling(host, self._roles, decoding, self._principals)
                with self._all_or_nothing():
                    self._recorded.begin(slots, terms, uniforms)
                self._under_way = UnderWay(self, at)
                return self._under_way
            proposal = self.propose(at, slots, num_candidates=num_candidates(decoding), min_p=decoding.min_p)
            rewards = token_rewards(self._principals, by_role(self._roles, proposal.role_logprobs_BRK))
            played = play(decoding, proposal, rewards, terms, uniforms)
            host.newest_S[list(slots)] = played.token_ids.to(host.device)
            return played.outcomes(terms)

    def _settle(self, at: Position) -> None:
        """See to the outcome of the step before `at`; where that corrects a token, compute what followed it again."""
        under_way, self._under_way = self._under_way, None
        # a step that is asked for again has nothing behind it
        if under_way is not None and under_way.settle() and under_way.at != at:
            assert isinstance(self._host, Host)
            with self._all_or_nothing():
                self._host.compute_again()

    def settle(self) -> tuple[list[TokenOutcome], bool]:
        """The outcome of the games that were begun, and whether a token is another one than was gone on with."""
        assert self._recorded is not None
        assert self._watch_games is not None
        try:
            with self._all_or_nothing(), self._watch_games.running():
                return self._recorded.settle()
        except BaseException:
            self._under_way = self._recorded = None
            raise

    def work(self) -> HostWork:
        """What a language model's host did so far."""
        host = self._host
        assert isinstance(host, Host)
        assert self._watch_games is not None
        return HostWork(*host.work, self._watch_games.seconds)


class UnderWay(Pending):
    """Games that a device plays, of the step at `at`."""

    def __init__(self, host: SamplingHost, at: Position) -> None:
        self.at = at
        self._host = host
        self._outcomes: list[TokenOutcome] | None = None
        self._error: Exception | None = None

    def settle(self) -> bool:
        """Whether a token is another one than the host has gone on with; once, and no more."""
        if self._error is not None:
            raise self._error
        if self._outcomes is not None:
            return False
        try:
            self._outcomes, is_other = self._host.settle()
        except Exception as error:
            # whoever settled it, the one who waits for it is told, too; not by this very error, which holds on to
            # all that its frames know
            kind = type(error) if isinstance(error, CageError) else RuntimeError
            self._error = kind(str(error) or type(error).__name__)
            raise
        return is_other

    def wait(self) -> list[TokenOutcome]:
        self.settle()
        assert self._outcomes is not None
        return self._outcomes


def load_playing_host(assembly: Assembly, index: int, watch: Watcher = unwatched) -> SamplingHost:
    """Load the run's host number `index` into this process. Raises ConfigurationError."""
    topology = assembly.topology
    host = load_any_host(assembly.hosts[index])
    can_record = len(topology.hosts) == 1 and can_build_for(host.device)
    rules = {variant.rule for variant in assembly.variants}
    return SamplingHost(
        host,
        topology.hosts[index].roles,
        assembly.config.decoding,
        topology.principals,
        watch,
        records_games=can_record and CapturedSampling.serves(topology.principals, rules, assembly.config.decoding),
    )
