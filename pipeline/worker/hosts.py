"""Hosts as the protocol calls them: a model runner, and a guard that knows the position of each group of slots.

A call that expects another state than the host has computes nothing: it raises StateLost, and the coordinator begins
its rows again. So a lost reply, a repeated call or a restarted process never changes a result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.attention.transfers import on_device
from pipeline.errors import HostOutOfMemory, StateLost
from pipeline.protocol.messages import Candidates, HostWork, MemoryBudget, Position, Step
from pipeline.worker.branch_runner import BranchRunner
from pipeline.worker.reward_values import due_rows, rewards_of_answer, spread_rewards

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # messages of libraries, in lower case


class Runner(Protocol):
    """What any host runs: a model with the state of its rows.

    A runner knows no positions: it computes what it is given. Its host makes sure that a step is computed once, and
    that nothing is read from a state that a failed call has left behind.
    """

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def work(self) -> tuple[int, int, float]:
        """Passes so far, tokens that went through them, and the seconds that they took."""

    @property
    def cache_bytes(self) -> int:
        """Bytes that its rows take in memory: keys, values and states."""

    def advance(self, step: Step) -> None:
        """Read parts of new rows' prompts and append one token to each running row."""

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of `row_tokens` tokens, and what is free."""

    def resize(self, num_slots: int) -> None:
        """Forget all rows and hold `num_slots` at once from now on."""


class LanguageRunner(Runner, Protocol):
    """What a language model's host runs: `LanguageModelRunner`, or `PlainRunner` one row at a time.

    Attributes:
        newest_S: by slot, the newest token that was drawn on the device.
    """

    newest_S: Tensor

    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        """The base role's candidates for each slot, most likely first; None proposes the whole vocabulary."""

    def logprobs_at(self, slots: Sequence[int], ids_BK: Tensor | None) -> Tensor:
        """Log-probabilities [B, R, K] in nats of every role at the candidates; None: at the whole vocabulary."""

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        """Teacher forcing: log-probabilities [R, T] of the answer's tokens under each role."""


class PositionGuard:
    """Keeps the position of each group, and forgets all of them when a call fails.

    Args:
        device: where the host computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, Position] = {}

    def is_at(self, at: Position) -> bool:
        """Whether the group is at `at` already, so that the call is a repeated one.

        Step 0 begins an epoch, whatever the position was.

        Raises:
            StateLost: the group is not one step before `at` either.
        """
        held = self._held.get(at.group)
        if held == at:
            return True
        if at.step > 0 and held != at.before:
            raise StateLost(f"{at} does not follow {held}")
        return False

    def check(self, at: Position) -> None:
        """Raise StateLost unless the group is at `at`."""
        held = self._held.get(at.group)
        if held != at:
            raise StateLost(f"{at} is asked for and {held} is held")

    def arrived(self, at: Position) -> None:
        """Note that the group is at `at`."""
        self._held[at.group] = at

    def forget(self) -> None:
        """Forget all positions: every group has to begin an epoch."""
        self._held.clear()

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Forget all positions if the block fails: it may have left any row half-written.

        Raises:
            HostOutOfMemory: an allocation failed. The coordinator then halves the batch.
        """
        try:
            with on_device(self._device):
                yield
        except BaseException as error:
            self.forget()
            if is_out_of_memory(error):
                raise HostOutOfMemory(" ".join(str(error).split())[:300] or "out of memory") from error
            raise


RunnerT = TypeVar("RunnerT", bound=Runner)


class GuardedHost(Generic[RunnerT]):
    """The part that all hosts share: they advance, report their memory budget and resize.

    Args:
        runner: the model.
    """

    def __init__(self, runner: RunnerT) -> None:
        self._runner = runner
        self._guard = PositionGuard(runner.device)

    def advance(self, at: Position, step: Step) -> None:
        """Bring the group to `at`; see `Scores.advance`."""
        if self._guard.is_at(at):
            return
        with self._guard.all_or_nothing():
            self._runner.advance(step)
            self._guard.arrived(at)

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of so many tokens, and what is free."""
        return self._runner.memory_budget(row_tokens)

    def resize(self, num_slots: int) -> None:
        """Forget every row and hold `num_slots` of them from now on."""
        # first: a resize that fails leaves no rows either
        self._guard.forget()
        with self._guard.all_or_nothing():
            self._runner.resize(num_slots)

    def work(self) -> HostWork:
        """Passes, tokens and seconds so far, and what its rows take in memory."""
        num_forwards, num_tokens, forward_s = self._runner.work
        return HostWork(num_forwards, num_tokens, forward_s, cache_bytes=self._runner.cache_bytes)


class LanguageModelHost(GuardedHost[LanguageRunner]):
    """A language model's host: it scores and proposes (`Proposes`).

    Args:
        runner: the model.
    """

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Candidates:
        """Bring the group to `at` and propose for these slots."""
        self.advance(at, step)
        with self._guard.all_or_nothing():
            return self._runner.propose(slots, num_candidates=num_candidates, min_p=min_p)

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Candidates | None
    ) -> Tensor:
        """Log-probabilities [B, R, K] of every role at the candidates; None: of the whole vocabulary."""
        self._guard.check(at)
        with self._guard.all_or_nothing():
            return self._runner.logprobs_at(slots, None if proposal is None else proposal.ids_BK)

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        """Log-probabilities [R, T] of an answer's tokens."""
        with self._guard.all_or_nothing():
            return self._runner.score(prompts, answer, weights)


class RewardModelHost(GuardedHost[BranchRunner]):
    """A sequence reward model's host: it scores (`Scores`). Its values are rewards in nats, scaled and signed.

    Args:
        runner: the model; each of its roles has a `Scoring`.
    """

    def __init__(self, runner: BranchRunner) -> None:
        super().__init__(runner)
        self._scorings = [role.scoring for role in runner.roles if role.scoring is not None]

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Candidates | None
    ) -> Tensor:
        """Rewards [B, R, K] of all candidates: of those that are not scored, the least of the row's scored ones.

        A row is scored at every `interval`-th token; in between its rewards are 0.
        """
        self._guard.check(at)
        if proposal is None:
            raise ValueError("a reward model needs the base's candidates")
        due = due_rows(self._scorings, num_tokens)
        with self._guard.all_or_nothing():
            scored = None
            if due:
                num_scored = max(scoring.candidates for scoring in self._scorings)
                base_DK = proposal.base_logprobs_BK[due]
                at_DN = base_DK.topk(min(num_scored, base_DK.shape[1]), dim=-1).indices
                ids_DN = at_DN if proposal.ids_BK is None else proposal.ids_BK[due].gather(-1, at_DN)
                scored = at_DN, self._runner.rewards_at([slots[row] for row in due], ids_DN)
            return spread_rewards(scored, self._scorings, num_tokens, proposal)

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        """Rewards [R, T] of an answer's tokens, by the same rule as while decoding; NaN where it does not fit."""
        with self._guard.all_or_nothing():
            return rewards_of_answer(self._runner.score(prompts, answer), self._scorings)


class TextModelHost(GuardedHost[BranchRunner]):
    """The host of a language model whose tokens are not the base's: it scores (`Scores`).

    Its values are log-probabilities in nats of the candidates' texts after the text of the answer so far.

    Args:
        runner: the model.
    """

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Candidates | None
    ) -> Tensor:
        """Log-probabilities [B, R, K] of every role at the candidates; 0 where min_p has dropped one."""
        self._guard.check(at)
        if proposal is None or proposal.ids_BK is None:
            raise ValueError("a model that reads text needs the base's candidates")
        base_BK = proposal.base_logprobs_BK
        with self._guard.all_or_nothing():
            kept_BK = base_BK > -torch.inf
            wanted = [ids_K[kept_K].tolist() for ids_K, kept_K in zip(proposal.ids_BK, kept_BK, strict=True)]
            values_BRK = base_BK.new_zeros(len(slots), len(self._runner.roles), base_BK.shape[1])
            for row, found_RN in enumerate(self._runner.gains(slots, wanted)):
                values_BRK[row, :, kept_BK[row]] = found_RN.to(values_BRK)
            return values_BRK

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        """What each token of an answer adds to each role's log-probability, [R, T]; NaN where it does not fit."""
        with self._guard.all_or_nothing():
            return self._runner.score(prompts, answer)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a device or in main memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in NO_MEMORY)
