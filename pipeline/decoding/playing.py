"""A host that plays: where one host holds every role, candidates, values, games and draws stay on its device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import DecodingConfig
from pipeline.decoding.assembly import Assembly
from pipeline.decoding.games import by_role, num_candidates, play, token_rewards
from pipeline.decoding.lineup import PrincipalRoles
from pipeline.decoding.running import Terms, TokenOutcome
from pipeline.errors import StateLost
from pipeline.models.host import Host
from pipeline.models.messages import DRAWN, HostRole, Position, Step
from pipeline.models.positions import PositionedHost
from pipeline.models.reward_host import RewardHost
from pipeline.models.reward_loading import load_any_host
from pipeline.points import Watcher, unwatched


@dataclass(frozen=True, slots=True)
class HostWork:
    """What a host did since it was loaded: passes, tokens that went through them, seconds in passes and in games."""

    num_forwards: int
    num_tokens: int
    forward_s: float
    solve_s: float


class PlayingHost(PositionedHost):
    """A `PositionedHost` that can play the games of its rows.

    Args:
        host: the host.
        roles: its roles, the base's first.
        decoding: candidates and draws.
        principals: all of the run's; their roles must be this host's where `play` is called.
        watch: called at the points of a step, for tests.
    """

    def __init__(
        self,
        host: Host | RewardHost,
        roles: Sequence[HostRole],
        decoding: DecodingConfig,
        principals: Sequence[PrincipalRoles],
        watch: Watcher = unwatched,
    ) -> None:
        super().__init__(host, watch)
        self._roles = roles
        self._decoding = decoding
        self._principals = principals
        self._solve_s = 0.0
        self._drawn: dict[int, int] = {}  # the newest token of each slot that was played here

    def advance_and_play(
        self,
        at: Position,
        step: Step,
        slots: Sequence[int],
        terms: Sequence[Terms],
        uniforms: Sequence[float],
    ) -> list[TokenOutcome]:
        """Bring the group to `at` and draw a token for each of these slots, in one call.

        Raises StateLost when the group is not one step before `at`, or a token of the step was not drawn here.
        """
        self.advance(at, Step(step.admissions, step.slots, self._known(step)))
        outcomes = self.play(at, slots, terms, uniforms)
        self._drawn |= {slot: outcome.token_id for slot, outcome in zip(slots, outcomes, strict=True)}
        return outcomes

    def resize(self, num_slots: int) -> None:
        """Forget every row and make room for another number of them."""
        self._drawn.clear()
        super().resize(num_slots)

    def _known(self, step: Step) -> list[int]:
        """The tokens of a step, those drawn here among them; a slot's is not known while its next one is drawn."""
        try:
            return [
                self._drawn.pop(slot) if token == DRAWN else token
                for slot, token in zip(step.slots, step.tokens, strict=True)
            ]
        except KeyError as missing:
            raise StateLost(f"no token was drawn for slot {missing}") from None

    def play(
        self, at: Position, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> list[TokenOutcome]:
        """Draw a token for each slot at `at`. Raises StateLost when the group is elsewhere."""
        started_s = time.perf_counter()
        proposal = self.propose(at, slots, num_candidates=num_candidates(self._decoding), min_p=self._decoding.min_p)
        rewards = token_rewards(self._principals, by_role(self._roles, proposal.role_logprobs_BRK))
        outcomes = play(self._decoding, proposal, rewards, terms, uniforms)
        self._solve_s += time.perf_counter() - started_s
        return outcomes

    def work(self) -> HostWork:
        """What a language model's host did so far."""
        host = self._host
        assert isinstance(host, Host)
        return HostWork(*host.work, self._solve_s)


def load_playing_host(assembly: Assembly, index: int, watch: Watcher = unwatched) -> PlayingHost:
    """Load the run's host number `index` into this process. Raises ConfigurationError."""
    roles = assembly.lineup.hosts[index].roles
    host = load_any_host(assembly.hosts[index])
    return PlayingHost(host, roles, assembly.config.decoding, assembly.lineup.principals, watch)
