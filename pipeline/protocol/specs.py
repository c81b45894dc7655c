"""Specs: all that is needed to start a host on any machine. Picklable, without loaded models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from cage.rule_names import RuleName
from pipeline.protocol.topology import HostRole, PrincipalPlan

if TYPE_CHECKING:
    from pipeline.hub.retokeniser import Retokeniser
    from pipeline.hub.sources import AdapterSource, ModelSource


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How candidates are chosen and a token is drawn.

    Args:
        num_candidates: how many of the base's likeliest tokens take part; None: all of the vocabulary.
        min_p: candidates less likely than `min_p` times the likeliest one are left out.
        temperature: of the final draw; 0 takes the likeliest token.
        top_p: the final draw is from the fewest tokens with so much of the policy's mass.
    """

    num_candidates: int | None = 50
    min_p: float = 0.0
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class GameSpec:
    """What a host needs to solve the games of its rows and draw their tokens itself.

    Args:
        sampling: candidates and draws.
        principals: all of the run's; their roles are all on this host.
        rules: the rules that rows of the run may be decided by.
        draws_alike: whether all rows are drawn with the temperature and top_p of `sampling`.
    """

    sampling: SamplingOptions
    principals: tuple[PrincipalPlan, ...]
    rules: frozenset[RuleName]
    draws_alike: bool = True


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """How a sequence reward model scores.

    Args:
        labels: each role's output by its number or name, in the order of the roles; None where there is one.
        ends: whether each role scores a text as if it ended there; None: as the head was trained.
        end_id: the token that it reads at the end of an answer; None where there is none.
        retokeniser: reads the base's tokens where the model's own differ; None: they are the same.
        stop_ids: the base's tokens that end an answer.
    """

    labels: tuple[int | str | None, ...]
    ends: tuple[bool | None, ...] = ()
    end_id: int | None = None
    retokeniser: Retokeniser | None = None
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class TextSpec:
    """How a language model reads the base's answers whose own tokens are others.

    Args:
        retokeniser: reads the base's tokens; None while a replica is planned.
        num_candidates: of the base's, whose texts it reads at most.
    """

    retokeniser: Retokeniser | None = None
    num_candidates: int = 0


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which rank of a tensor parallel host a process is.

    Args:
        rank: from 0, which answers.
        size: ranks of the group.
        meeting_point: where the ranks find each other: a file of their machine, or the address and port of a store.
        is_on_one_machine: whether all ranks are on the same machine for certain.
        timeout_s: how long a rank waits for the others, in every collective.
        device_index: the rank's GPU among those that its process sees.
    """

    rank: int
    size: int
    meeting_point: str
    is_on_one_machine: bool
    timeout_s: float
    device_index: int = 0


class Drafts(StrEnum):
    """On what devices steps may have proposed tokens."""

    NOWHERE = "nowhere"
    CPU = "cpu"
    ANYWHERE = "anywhere"

    def are_on(self, device_type: str) -> bool:
        """Whether they may on a "cpu", or "cuda"."""
        return self is Drafts.ANYWHERE or (self is Drafts.CPU and device_type == "cpu")


@dataclass(frozen=True, slots=True)
class HostSpec:
    """All that a process needs to start a host.

    Args:
        name: of the host.
        serves: the principals (and "base") that need it, for error messages.
        source: the model's files.
        dtype: as configured.
        device: as configured.
        roles: what it serves.
        num_slots: rows at once.
        vocab_size: token ids that all models of the run share.
        drafts: where steps may have proposed tokens.
        strict: whether a row's bits must not depend on the batch composition.
        cache_folder: where weights are fetched to that are not on the machine.
        adapters: LoRA adapters by the names that roles use.
        reward: set for a sequence reward model.
        text: set for a language model whose tokens are not the base's.
        games: set for a host that holds every role of the run.
        attention: as configured: "auto", "slots" or "plain".
        holes: ids below `vocab_size` that no token has.
        tensor_parallel: ranks that the weights are split over, each a process of its own.
        layers: of a model that proposes tokens, how many of its layers are loaded; None: all.
        pipeline_parallel: devices of the process that the layers are spread over.
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
    text: TextSpec | None = None
    games: GameSpec | None = None
    attention: str = "auto"
    holes: tuple[int, ...] = ()
    drafts: Drafts = Drafts.NOWHERE
    tensor_parallel: int = 1
    layers: int | None = None
    pipeline_parallel: int = 1

    @property
    def title(self) -> str:
        """The model and the principals that it serves, for error messages."""
        kind = "model" if self.reward is None else "reward model"
        return f"{kind} {self.source.name} (for {', '.join(self.serves)})"
