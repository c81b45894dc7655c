"""A host that knows how far it is, and computes from no other state than the one that a call expects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.attention.transfers import on_device
from pipeline.errors import HostOutOfMemory, StateLost
from pipeline.points import Point, Watcher, unwatched
from pipeline.protocol.messages import Candidates, Position, Rewards, Step
from pipeline.worker.language_model_runner import Host
from pipeline.worker.memory import Room
from pipeline.worker.reward_model_runner import RewardModelRunner

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class PositionedHost:
    """Checks every call of a host against the position that it holds for the call's group.

    Args:
        host: the host.
        watch: called at the points of a step, for tests.
    """

    def __init__(self, host: Host | RewardModelRunner, watch: Watcher = unwatched) -> None:
        self._host = host
        self._watch = watch
        self._held: dict[int, Position] = {}

    def advance(self, at: Position, step: Step) -> None:
        """Bring the group to `at`: compute the new rows' prompts, append one token to the others.

        A repeated call changes nothing. Raises StateLost unless the group is one step before `at`; a step 0 begins
        anew whatever is held.
        """
        held = self._held.get(at.group)
        if held == at:
            return
        if at.step > 0 and held != at.before:
            raise StateLost(f"{at} does not follow {held}")
        with self._all_or_nothing():
            self._host.advance(step.admissions, step.slots, step.tokens)
            if step.admissions:
                self._watch(Point.MID_PREFILL, step.admissions)
            if step.slots:
                self._watch(Point.MID_STEP, step.tokens)
            self._held[at.group] = at

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Candidates:
        """Bring the group to `at` and propose for these slots, in one call."""
        self.advance(at, step)
        return self.propose(at, slots, num_candidates=num_candidates, min_p=min_p)

    def propose(self, at: Position, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        """The base's candidates at `at`. Raises StateLost when the group is elsewhere."""
        self._check(at)
        assert isinstance(self._host, Host), "a reward model proposes nothing"
        with self._all_or_nothing():
            return self._host.propose(slots, num_candidates=num_candidates, min_p=min_p)

    def logprobs_at(self, at: Position, slots: Sequence[int], proposal: Candidates | None) -> Tensor:
        """Log-probabilities of the candidates at `at`; None: of the whole vocabulary.

        Raises StateLost when the group is elsewhere.
        """
        self._check(at)
        assert isinstance(self._host, Host), "a reward model has no log-probabilities"
        with self._all_or_nothing():
            return self._host.logprobs_at(slots, None if proposal is None else proposal.ids_BK)

    def rewards_at(
        self, at: Position, slots: Sequence[int], rows: Sequence[int], proposal: Candidates, num_scored: int
    ) -> Rewards:
        """What the `num_scored` likeliest candidates add to a reward model's score at `at`.

        `rows` are the places of the slots in the proposal. Raises StateLost when the group is elsewhere.
        """
        self._check(at)
        assert isinstance(self._host, RewardModelRunner), "a language model has no scores"
        with self._all_or_nothing():
            base_DK = proposal.base_logprobs_BK[rows]
            at_DN = base_DK.topk(min(num_scored, base_DK.shape[1]), dim=-1).indices
            ids_DN = at_DN if proposal.ids_BK is None else proposal.ids_BK[rows].gather(-1, at_DN)
            return Rewards(at_DN, self._host.rewards_at(slots, ids_DN))

    def score(self, prompts: Mapping[str, Sequence[int]], continuation: Sequence[int]) -> Tensor:
        """Teacher forcing; depends on no state."""
        with self._all_or_nothing():
            return self._host.score(prompts, continuation)

    def room(self, row_tokens: int) -> Room:
        """What a slot takes with rows of so many tokens, and what is free."""
        return self._host.room(row_tokens)

    def resize(self, num_slots: int) -> None:
        """Forget every row and make room for another number of them."""
        self._held.clear()
        with self._all_or_nothing():
            self._host.resize(num_slots)

    def _check(self, at: Position) -> None:
        held = self._held.get(at.group)
        if held != at:
            raise StateLost(f"{at} is asked for and {held} is held")

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Forget all positions if the call fails: it may have left any row half-written."""
        try:
            with on_device(self._host.device):
                yield
        except BaseException as error:
            self._held.clear()
            if is_out_of_memory(error):
                raise HostOutOfMemory(" ".join(str(error).split())[:300] or "out of memory") from error
            raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in main memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in NO_MEMORY)
