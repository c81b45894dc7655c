"""The messages between a coordinator and its hosts, all frozen. Imports nothing heavy.

B rows of a call, R roles of a host, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cage.rule_names import RuleName

if TYPE_CHECKING:
    from torch import Tensor

DRAWN = -1  # stands for the token that the host itself drew for the slot
MOST_DRAFTED = 8  # proposed tokens of one slot in a step
DRAFTED_PER_PASS = 32  # of all slots
PASS_ROWS = 64  # where passes have fixed shapes, they have a multiple of so many rows: a tile of matrix kernels
PROMPT_TOKENS_PER_STEP = 4096  # of all roles together, so that running rows do not wait long for new ones
CHUNK = 1024  # tokens of a prompt that are computed in one step; another value changes the last bits of results


@dataclass(frozen=True, slots=True)
class Admission:
    """A part of a new row's prompts: the tokens that its roles read before anything is drawn.

    Part n is tokens [n * CHUNK, (n + 1) * CHUNK) of every prompt; with the last part the row begins to run.

    Args:
        slot: where the row will run.
        prompts: token ids by role of the host.
        shared_prefixes: by role, the length of the prefix that other prompts may share.
        part: which part this is.
        is_last: whether it is the last one.
        answer: tokens that the row had drawn before its host lost it, and keeps.
        weights: the row's preference weights, for roles that take them.
    """

    slot: int
    prompts: Mapping[str, Sequence[int]]
    shared_prefixes: Mapping[str, int] = field(default_factory=dict)
    part: int = 0
    is_last: bool = True
    answer: Sequence[int] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens of a slot, which follow its newest token in the same pass.

    The slot keeps none of them: the next step says how many were drawn. What may follow each one is asked for by a
    number of its own, a lane, in the place of a slot's.

    Args:
        slot: the slot.
        tokens: proposed.
        lanes: one for each token; numbers from the number of slots on, or of slots without a row.
    """

    slot: int
    tokens: Sequence[int]
    lanes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Step:
    """What a step brings to a host.

    Args:
        admissions: parts of new rows' prompts.
        slots: the running slots that append a token.
        tokens: the newest token of each of them; DRAWN where the host itself drew it.
        accepted: by slot, how many tokens of its draft in the last step were drawn, where there are any: the slot
            keeps them before its newest token.
        drafts: proposed tokens.
    """

    admissions: Sequence[Admission] = ()
    slots: Sequence[int] = ()
    tokens: Sequence[int] = ()
    accepted: Mapping[int, int] = field(default_factory=dict)
    drafts: Sequence[Draft] = ()


def rows_of_pass(num_rows: int) -> int:
    """Rows of a pass of a fixed shape that holds `num_rows`: what rounds them up is room for proposed tokens."""
    return PASS_ROWS * max(1, -(-num_rows // PASS_ROWS))


def most_drafted(num_slots: int, rows_of_slot: int = 0) -> int:
    """Proposed tokens that a step may have while every slot runs, where a host verifies them at all.

    Args:
        num_slots: of the host.
        rows_of_slot: rows of a pass that a slot takes, and each proposed token as well, where passes have fixed
            shapes; 0: they do not.
    """
    most = min(MOST_DRAFTED * num_slots, DRAFTED_PER_PASS)
    if not rows_of_slot:
        return most
    num_rows = num_slots * rows_of_slot
    return min(most, (rows_of_pass(num_rows) - num_rows) // rows_of_slot)


def num_parts(num_tokens: int) -> int:
    """Number of parts in which a prompt of `num_tokens` is computed.

    Its last token is not counted: it is computed with the first step, like the newest token of a running row.
    """
    return max(1, -(-(num_tokens - 1) // CHUNK))


@dataclass(frozen=True, slots=True)
class Position:
    """How far a group of slots is. Every call carries one, so that a host notices a lost or repeated call.

    Args:
        group: the number of the group.
        epoch: a random number that changes whenever the group's rows begin again.
        step: steps since the epoch began, from 0.
    """

    group: int
    epoch: int
    step: int

    @property
    def before(self) -> Position:
        """The position one step earlier in the epoch."""
        return Position(self.group, self.epoch, self.step - 1)

    @property
    def after(self) -> Position:
        """The position one step later in the epoch."""
        return Position(self.group, self.epoch, self.step + 1)

    def __str__(self) -> str:
        return f"step {self.step} of group {self.group}, epoch {self.epoch:x}"


@dataclass(frozen=True, slots=True)
class Candidates:
    """The base's proposal, and the values of its host's own roles there.

    Args:
        ids_BK: token ids; None: the whole vocabulary, in its own order.
        base_logprobs_BK: of the base, in nats; -inf where min_p drops a candidate.
        covered_mass_B: the base's probability of all remaining candidates.
        role_logprobs_BRK: in nats, in the order of the host's roles.
    """

    ids_BK: Tensor | None
    base_logprobs_BK: Tensor
    covered_mass_B: Tensor
    role_logprobs_BRK: Tensor

    def rows(self, at: Sequence[int] | Tensor) -> Candidates:
        """The candidates of some rows."""
        return Candidates(
            None if self.ids_BK is None else self.ids_BK[at],
            self.base_logprobs_BK[at],
            self.covered_mass_B[at],
            self.role_logprobs_BRK[at],
        )

    def cpu(self) -> Candidates:
        """The same candidates in main memory."""
        return Candidates(
            None if self.ids_BK is None else self.ids_BK.cpu(),
            self.base_logprobs_BK.cpu(),
            self.covered_mass_B.cpu(),
            self.role_logprobs_BRK.cpu(),
        )


@dataclass(frozen=True, slots=True)
class Terms:
    """What a row's games are decided by.

    Args:
        rule: which rule turns base and values into a policy.
        agent_temperature: tau, in nats of weighted reward.
        weights: the preference weight of each principal, in the principals' order.
        k: of each principal, for rules that take it; empty for others.
        draw: temperature and top_p of the row's draws, where they are not those of the run's `SamplingOptions`.
    """

    rule: RuleName
    agent_temperature: float
    weights: tuple[float, ...]
    k: tuple[float, ...] = ()
    draw: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class TokenOutcome:
    """What one step gave one row.

    Args:
        token_id: the drawn token.
        rewards: q of the drawn token by principal, in nats.
        payments: what each principal pays for it, in nats; None under a rule without payments.
        thresholds: the value above which each principal pays; None likewise.
        base_logprob: log-probability of the drawn token under the base, in nats.
        logprob: log-probability of the drawn token under the policy that drew it, in nats.
        kl: KL divergence of the policy to the base over the candidates, in nats.
        covered_mass: the base's probability of all candidates.
        residual: how far the game is from its equilibrium.
        status: how the solve ended, a `cage.Status`.
        num_steps: the solver's steps.
    """

    token_id: int
    rewards: Sequence[float]
    payments: Sequence[float] | None
    thresholds: Sequence[float] | None
    base_logprob: float
    logprob: float
    kl: float
    covered_mass: float
    residual: float
    status: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class HostWork:
    """What a host did since it was loaded.

    Args:
        num_forwards: forward passes.
        num_tokens: tokens that went through them.
        forward_s: seconds in passes, measured on the device.
        solve_s: seconds in which games were solved and tokens drawn; 0 for a host that does neither.
        cache_bytes: what its rows take in memory now: keys, values and states.
    """

    num_forwards: int = 0
    num_tokens: int = 0
    forward_s: float = 0.0
    solve_s: float = 0.0
    cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What one slot of a host takes, and what is free where the host is.

    Args:
        place: identifies the memory among all machines; hosts that share it report the same.
        device_type: "cpu" or "cuda".
        slot_bytes: bytes that one slot takes with rows of the requested length.
        free_bytes: bytes that could be allocated there now.
        verifies_drafts: whether a step may have proposed tokens.
        rows_of_slot: see `most_drafted`.
        reserved_bytes: of the free ones, what the host takes beside its slots, however many they are.
        others: of the host's other devices, where its layers are spread over several.
    """

    place: str
    device_type: str
    slot_bytes: int
    free_bytes: int
    verifies_drafts: bool = False
    rows_of_slot: int = 0
    reserved_bytes: int = 0
    others: tuple[MemoryBudget, ...] = ()
