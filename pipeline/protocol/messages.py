"""What a coordinator and its hosts say to each other. Imports nothing heavy: every process of a run reads it.

B rows of a call, R roles of a host, K candidates, N those of them that are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.hub.retokeniser import Retokeniser
    from pipeline.hub.sources import AdapterSource, ModelSource


DRAWN = -1  # stands for the token that the host itself drew for the slot
CHUNK = 1024  # tokens of a prompt that are computed in one step; another number gives other last bits


@dataclass(frozen=True, slots=True)
class HostRole:
    """One distribution that a host serves: the name by which the coordinator asks, and the LoRA adapter if any."""

    name: str
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """A part of a new row for `slot`: its prompt's token ids for each role of the host.

    `heads` counts, by role, the first tokens that other prompts may share. Part n is tokens [n * CHUNK,
    (n + 1) * CHUNK) of every prompt; with the last part the row begins to run. `answer` holds tokens that a row kept,
    for a reward host; for others they are at the prompts' ends.
    """

    slot: int
    prompts: Mapping[str, Sequence[int]]
    heads: Mapping[str, int] = field(default_factory=dict)
    part: int = 0
    is_last: bool = True
    answer: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """What a step brings to a host: parts of new rows' prompts, and the newest token of each running slot.

    A token may be DRAWN where the host plays.
    """

    admissions: Sequence[Admission] = ()
    slots: Sequence[int] = ()
    tokens: Sequence[int] = ()


def num_parts(num_tokens: int) -> int:
    """Number of parts in which a prompt is computed; its last token comes with the first step."""
    return max(1, -(-(num_tokens - 1) // CHUNK))


@dataclass(frozen=True, slots=True)
class Position:
    """Where a group of slots is: the step of an epoch. An epoch begins, at step 0, whenever the rows start anew."""

    group: int
    epoch: int
    step: int

    @property
    def before(self) -> Position:
        return Position(self.group, self.epoch, self.step - 1)

    @property
    def after(self) -> Position:
        return Position(self.group, self.epoch, self.step + 1)

    def __str__(self) -> str:
        return f"step {self.step} of group {self.group}, epoch {self.epoch:x}"


@dataclass(frozen=True, slots=True)
class Candidates:
    """The base's proposal and the host's own roles at it.

    ids_BK (None: the whole vocabulary); base_logprobs_BK in nats, -inf where min_p drops one; covered_mass_B the base
    probability of what is left; role_logprobs_BRK in the order of the host's roles.
    """

    ids_BK: Tensor | None
    base_logprobs_BK: Tensor
    covered_mass_B: Tensor
    role_logprobs_BRK: Tensor

    def rows(self, at: Sequence[int] | Tensor) -> Candidates:
        """Those of some rows."""
        return Candidates(
            None if self.ids_BK is None else self.ids_BK[at],
            self.base_logprobs_BK[at],
            self.covered_mass_B[at],
            self.role_logprobs_BRK[at],
        )

    def cpu(self) -> Candidates:
        """The same in main memory."""
        return Candidates(
            None if self.ids_BK is None else self.ids_BK.cpu(),
            self.base_logprobs_BK.cpu(),
            self.covered_mass_B.cpu(),
            self.role_logprobs_BRK.cpu(),
        )


@dataclass(frozen=True, slots=True)
class Rewards:
    """What candidates add to a reward model's score: values [D, R, N] of the D rows that were asked for, and which of
    a row's K candidates they belong to, [D, N]."""

    at_DN: Tensor
    values_DRN: Tensor


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """How a sequence reward model scores: the index of each role's output in the order of the roles, and how it reads
    the base's tokens where its own differ (None: they are the same)."""

    labels: tuple[int, ...]
    retokeniser: Retokeniser | None = None


@dataclass(frozen=True, slots=True)
class HostSpec:
    """All that a process needs to start a host, on any machine. Picklable.

    `serves` names the principals (and "base") for error messages; weights that are not on the machine are fetched
    into `cache_folder`. `reward` is set for a sequence reward model.
    """

    name: str
    serves: tuple[str, ...]
    source: ModelSource
    dtype: str
    device: str
    roles: tuple[HostRole, ...]
    num_slots: int
    vocab_size: int
    strict: bool
    cache_folder: Path
    adapters: Mapping[str, AdapterSource] = field(default_factory=dict)
    reward: RewardSpec | None = None

    @property
    def title(self) -> str:
        """The model and whom it serves, for error messages."""
        kind = "model" if self.reward is None else "reward model"
        return f"{kind} {self.source.name} (for {', '.join(self.serves)})"
