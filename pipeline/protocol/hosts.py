"""The wall between the coordinator and its hosts: one typed method per message.

The coordinator holds clients. A client's method sends a message to its host and returns a `Reply` at once; the host,
in this process or in another, has a method of the same name that computes the answer. What a host can do is a type:
every host scores, a language model's host proposes as well, and one that holds every role of the run also samples.

B rows of a call, R roles of a host, K candidates, T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from pipeline.protocol.messages import Candidates, HostWork, MemoryBudget, Position, Step, Terms, TokenOutcome

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Reply(Generic[T]):
    """A value that is still to come: the one future type of this project.

    Args:
        wait: waits for the value and returns it; called by `result` until it returns.
        handle: the transport's own reference to the value. It can be passed to another call of the same transport in
            place of the value, which need not be computed yet.
    """

    __slots__ = ("_value", "_wait", "handle")

    def __init__(self, wait: Callable[[], T], *, handle: object = None) -> None:
        self._wait: Callable[[], T] | None = wait
        self._value: T | None = None
        self.handle = handle

    @classmethod
    def of(cls, value: T) -> Reply[T]:
        """A reply whose value is known already."""
        reply = cls(lambda: value)
        reply.result()
        return reply

    @property
    def is_ready(self) -> bool:
        """Whether the value is known, so that `result` does not wait."""
        return self._wait is None

    def result(self) -> T:
        """Wait for the value and return it. Raises the error that the call ended with, again at every call."""
        if self._wait is not None:
            self._value = self._wait()
            self._wait = None
        return self._value  # type: ignore[return-value]  # set by now, and None where T allows it


class Scores(Protocol):
    """What every host can do, in its own process. Calls that fail raise an error of `pipeline.errors`.

    A `Position` comes with every call that reads or changes the state of rows. A reply may be lost and a call may be
    repeated: a host notices that by the position, and nothing is computed twice or from another state.
    """

    def advance(self, at: Position, step: Step) -> None:
        """Bring a group of slots to `at`: read parts of new prompts, append a token to each running row.

        A repeated call changes nothing. Step 0 of an epoch begins again, whatever the host holds.

        Args:
            at: the position after this step.
            step: what is new for the host.

        Raises:
            StateLost: the group is neither at `at` nor one step before it.
        """

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Candidates | None
    ) -> Tensor:
        """The outputs [B, R, K] of the host's roles at the candidates of these slots.

        Log-probabilities of a language model, rewards of a reward model, both in nats.

        Args:
            at: the position that the group must be at.
            slots: of the rows, and lanes of the step's drafts.
            num_tokens: how many tokens each row has drawn so far.
            proposal: the base's candidates, row by row; None: the whole vocabulary, for language models alone.

        Raises:
            StateLost: the group is elsewhere.
        """

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        """The outputs [R, T] for an existing answer, token by token (teacher forcing). Uses and changes no row.

        Args:
            prompts: token ids by role of the host.
            answer: the answer's token ids.
            weights: the row's, by principal, for roles that take them.
        """

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of `row_tokens` tokens, and what is free."""

    def resize(self, num_slots: int) -> None:
        """Forget every row and hold `num_slots` at once from now on."""

    def work(self) -> HostWork:
        """Passes, tokens and seconds since it was loaded, and what its rows take in memory."""


class Proposes(Scores, Protocol):
    """A host that serves the base."""

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Candidates:
        """`advance`, then the base's candidates for these slots, with the values of the host's own roles at them.

        Args:
            at: as in `advance`.
            step: as in `advance`.
            slots: that get a token in this step, and lanes of its drafts.
            num_candidates: how many, the likeliest first; None: the whole vocabulary.
            min_p: drops candidates less likely than `min_p` times the likeliest one.

        Raises:
            StateLost: as in `advance`.
        """


class Samples(Proposes, Protocol):
    """A host that holds every role of the run: candidates, games and draws stay on its device."""

    @property
    def runs_ahead(self) -> bool:
        """Whether it can begin a step while the outcome of the one before is still being computed."""

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        """`advance`, then solve the games of these slots and draw a token for each.

        Args:
            at: as in `advance`.
            step: as in `advance`; tokens may be DRAWN.
            slots: that get a token in this step, and lanes of its drafts.
            terms: rule, agent temperature and weights of each.
            uniforms: the uniform draw of each.

        Raises:
            StateLost: as in `advance`, and where a token is DRAWN that was not drawn here.
        """


class ScoringClient(Protocol):
    """The coordinator's end of a host that `Scores`; see there. Calls of one client run in the order of submission.

    A `Reply` among the arguments stands for its value, which need not be computed yet.
    """

    def advance(self, at: Position, step: Step) -> Reply[None]: ...

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Reply[Candidates] | None
    ) -> Reply[Tensor]: ...

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Reply[Tensor]: ...

    def memory_budgets(self, row_tokens: int) -> Reply[tuple[MemoryBudget, ...]]:
        """The budget of each process that the host consists of: its ranks."""

    def resize(self, num_slots: int) -> Reply[None]: ...


class ProposingClient(ScoringClient, Protocol):
    """The coordinator's end of a host that `Proposes`."""

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Reply[Candidates]: ...


class SamplingClient(ProposingClient, Protocol):
    """The coordinator's end of a host that `Samples`."""

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]: ...

    def work(self) -> Reply[HostWork]: ...


@dataclass(frozen=True, slots=True)
class Hosts:
    """The clients of one replica, in the order of the topology's hosts.

    Args:
        base: the base's host.
        others: the hosts beside it.
        sampler: the base's host where it is the only one, and then samples by itself.
        runs_ahead: whether a step is sent before the tokens of the last one have arrived, which hides the
            coordinator's work behind a lone host's. A row that ends is noticed one step later.
        is_concurrent: whether the hosts compute at the same time as the coordinator, so that it pays to let two
            groups of slots alternate.
    """

    base: ProposingClient
    others: tuple[ScoringClient, ...] = ()
    sampler: SamplingClient | None = None
    runs_ahead: bool = False
    is_concurrent: bool = False

    @classmethod
    def lone(cls, host: SamplingClient, *, runs_ahead: bool) -> Hosts:
        """One host that holds every role."""
        return cls(host, sampler=host, runs_ahead=runs_ahead)

    @property
    def all(self) -> tuple[ScoringClient, ...]:
        """Every client."""
        return (self.base, *self.others)
