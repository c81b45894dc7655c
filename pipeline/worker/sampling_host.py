"""Hosts that sample: where one host holds every role, candidates, values, games and draws stay on its device."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pipeline.errors import CageError, StateLost
from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import (
    DRAWN,
    HostWork,
    Position,
    Step,
    Terms,
    TokenOutcome,
)
from pipeline.protocol.specs import GameSpec
from pipeline.protocol.topology import HostRole
from pipeline.sampling.games import by_role, reward_at_weights, solve_and_sample, token_rewards
from pipeline.worker.captured_sampling import CapturedSampling
from pipeline.worker.hosts import LanguageModelHost, LanguageRunner, PositionGuard
from pipeline.worker.language_model_runner import LanguageModelRunner
from pipeline.worker.stopwatch import Stopwatch


class SamplingHost(LanguageModelHost):
    """A language model's host that solves the games of its rows itself and draws their tokens (`Samples`).

    Args:
        runner: the model; it serves every role of the run.
        roles: its roles, the base's first.
        games: candidates, draws and principals.
    """

    def __init__(self, runner: LanguageRunner, roles: Sequence[HostRole], games: GameSpec) -> None:
        super().__init__(runner)
        self._roles = roles
        self._games = games
        self._game_watch = Stopwatch(runner.device)
        self._drawn: set[int] = set()  # slots whose newest token was drawn here

    @property
    def runs_ahead(self) -> bool:
        """Whether it begins a step while the outcome of the one before is still being computed."""
        return False

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        """Bring the group to `at`, solve the games of these slots and draw a token for each; see `Samples`."""
        self._check_drawn(step)
        self.advance(at, step)
        reply = self.sample(at, slots, terms, uniforms)
        self._note_drawn(step, slots)
        return reply

    @torch.inference_mode()
    def sample(
        self, at: Position, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        """Draw a token for each slot at `at`. Raises StateLost when the group is elsewhere."""
        self._guard.check(at)
        options = self._games.sampling
        with self._guard.all_or_nothing(), self._game_watch.running():
            proposal = self._runner.propose(slots, num_candidates=options.num_candidates, min_p=options.min_p)
            principals, outputs = self._games.principals, by_role(self._roles, proposal.role_logprobs_BRK)
            rewards, at_weights = token_rewards(principals, outputs), reward_at_weights(principals, outputs)
            sampled = solve_and_sample(options, proposal, rewards, terms, uniforms, at_weights)
            newest_S = self._runner.newest_S
            newest_S[list(slots)] = sampled.token_ids.to(newest_S.device)
            return Reply.of(sampled.outcomes(terms))

    def resize(self, num_slots: int) -> None:
        """Forget every row and hold another number of them."""
        self._drawn.clear()
        super().resize(num_slots)

    def work(self) -> HostWork:
        """Passes, tokens and seconds so far, and what its rows take in memory."""
        return replace(super().work(), solve_s=self._game_watch.seconds)

    def _note_drawn(self, step: Step, slots: Sequence[int]) -> None:
        """Note the slots whose newest token the device has; that of a slot with a draft is known when the caller has
        compared, and a lane may be a slot without a row."""
        drafted = {place for draft in step.drafts for place in (draft.slot, *draft.lanes)}
        self._drawn = (self._drawn | set(slots)) - drafted

    def _check_drawn(self, step: Step) -> None:
        """Raise StateLost where a token of the step is DRAWN and was not drawn here."""
        unknown = [
            slot
            for slot, token in zip(step.slots, step.tokens, strict=True)
            if token == DRAWN and slot not in self._drawn
        ]
        if unknown:
            raise StateLost(f"no token was drawn for the slots {', '.join(map(str, unknown))}")


class CapturingHost(SamplingHost):
    """A `SamplingHost` on a GPU whose games are captured as CUDA graphs. It runs ahead.

    A captured solve takes a fixed number of steps. Whether they were enough is known only when the outcome is read,
    while the next pass runs already. If they were not and the corrected token is another one, that pass is computed
    again.

    Args:
        runner: the model; it serves every role of the run.
        roles: its roles, the base's first.
        games: candidates, draws and principals.
    """

    def __init__(self, runner: LanguageModelRunner, roles: Sequence[HostRole], games: GameSpec) -> None:
        super().__init__(runner, roles, games)
        self._language_runner = runner
        self._captured: CapturedSampling | None = None
        self._pending: PendingOutcomes | None = None

    @property
    def runs_ahead(self) -> bool:
        """Whether it begins a step while the outcome of the one before is still being computed."""
        return True

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        """Bring the group to `at` and begin to solve and sample; the reply waits for the device."""
        self._check_drawn(step)
        self.advance(at, step)
        self._settle_before(at)
        reply = self.sample(at, slots, terms, uniforms)
        self._note_drawn(step, slots)
        return reply

    @torch.inference_mode()
    def sample(
        self, at: Position, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        """Begin to draw a token for each slot at `at`."""
        with self._game_watch.running():
            self._guard.check(at)
            if self._captured is None:
                self._captured = CapturedSampling(self._language_runner, self._roles, self._games)
            with self._guard.all_or_nothing():
                self._captured.begin(slots, terms, uniforms)
            self._pending = PendingOutcomes(self._captured, self._guard, self._game_watch, at, self._give_up)
            return Reply(self._pending.wait)

    def resize(self, num_slots: int) -> None:
        """Forget every row and hold another number of them."""
        self._give_up()
        gc.collect()  # captured graphs are freed before the new rows take their memory
        super().resize(num_slots)

    def _settle_before(self, at: Position) -> None:
        """Settle the outcome of the step before `at`; where that corrects a token, compute the pass of `at` again."""
        pending, self._pending = self._pending, None
        # where `at` itself is pending the call is a repeated one, and no pass has read its token
        if pending is not None and pending.settle() and pending.at != at:
            with self._guard.all_or_nothing():
                self._language_runner.compute_again()

    def _give_up(self) -> None:
        """Release the captured graphs and the pending outcome."""
        self._pending = self._captured = None


class PendingOutcomes:
    """Outcomes that a device still computes. The host or the caller settles them, whoever needs them first.

    Args:
        captured: the games.
        guard: of the host.
        watch: counts the seconds of games.
        at: the position of the step.
        give_up: called where settling fails, so that the device's memory is released.
    """

    def __init__(
        self,
        captured: CapturedSampling,
        guard: PositionGuard,
        watch: Stopwatch,
        at: Position,
        give_up: Callable[[], None],
    ) -> None:
        self.at = at
        self._captured: CapturedSampling | None = captured
        self._guard = guard
        self._watch = watch
        self._give_up = give_up
        self._outcomes: list[TokenOutcome] = []
        self._error: Exception | None = None

    def settle(self) -> bool:
        """Wait for the device, at the first call; whether a token differs from the one that the next pass has read.

        Raises:
            CageError: the device failed; later calls raise an error of the same class.
            RuntimeError: likewise.
        """
        if self._error is not None:
            raise self._error
        captured, self._captured = self._captured, None
        if captured is None:
            return False
        try:
            with self._guard.all_or_nothing(), self._watch.running():
                self._outcomes, is_other = captured.settle()
        except Exception as error:
            self._give_up()
            # both the host and the caller have to see the failure. The second one gets a new error: this one's
            # traceback holds tensors, whose memory has to be released
            kind = type(error) if isinstance(error, CageError) else RuntimeError
            self._error = kind(str(error) or type(error).__name__)
            raise
        except BaseException:
            self._give_up()
            raise
        return is_other

    def wait(self) -> list[TokenOutcome]:
        """The outcomes by slot."""
        self.settle()
        return self._outcomes
