"""The ranks of a tensor parallel host: processes that each hold a part of one model's weights and compute together.

Every rank runs the same host and is sent the same messages, in the same order. The collectives are inside
transformers' modules; the first rank answers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from pipeline.protocol.hosts import Reply, Scores
from pipeline.protocol.messages import Candidates, HostWork, MemoryBudget, Position, Step, Terms, TokenOutcome
from pipeline.protocol.specs import RankPlace

if TYPE_CHECKING:
    from torch import Tensor

LOOPBACK = "lo"  # Linux' name of it


def open_store(address: str, size: int, *, timeout_s: float) -> tuple[Any, str]:
    """A store at which the ranks of several processes find each other, and where they find it.

    Args:
        address: of this machine, as the other ranks reach it.
        size: ranks of the group.
        timeout_s: how long they wait for each other.

    Returns:
        The store, which has to be kept, and the meeting point for `RankPlace`.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, 0, size, is_master=True, wait_for_workers=False, timeout=_duration(timeout_s)
    )
    return store, f"{address}:{store.port}"


_size = 1  # not torch's group: a process may belong to one of its user's


def join(place: RankPlace, device: str, store: Any = None) -> None:
    """Make this process a rank of its group. Returns when all ranks have joined.

    Args:
        place: which rank it is.
        device: "cpu" or "cuda", of every rank.
        store: where it is the rank that opened it.

    Raises:
        RuntimeError: the others did not come within the group's time.
    """
    # transformers and NCCL read it: which GPU of those that the process sees is the rank's
    os.environ["LOCAL_RANK"] = str(place.device_index)
    if place.is_on_one_machine and Path(f"/sys/class/net/{LOOPBACK}").is_dir():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)  # a host name need not lead anywhere
    if store is None and "/" in place.meeting_point:
        store = dist.FileStore(place.meeting_point, place.size)  # type: ignore[attr-defined]
    elif store is None:
        address, _, port = place.meeting_point.rpartition(":")
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, int(port), place.size, timeout=_duration(place.timeout_s)
        )
    global _size  # a process is a rank of one host
    _size = place.size
    if device == "cuda":
        torch.cuda.set_device(place.device_index)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.size,
        timeout=_duration(place.timeout_s),
    )


def num_ranks() -> int:
    """The ranks of the host that this process is one of; 1 where it is the whole host."""
    return _size


def agree(reason: str | None) -> str | None:
    """What all ranks do where one has a reason against it: the first reason of any rank, for all of them."""
    if num_ranks() == 1:
        return reason
    reasons: list[str | None] = [None] * num_ranks()
    dist.all_gather_object(reasons, reason)
    return next((each for each in reasons if each is not None), None)


def sum_over_ranks(part: Tensor) -> Tensor:
    """The sum of all ranks' parts, added from the first rank to the last."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(num_ranks())]
    dist.all_gather(parts, part)
    total, *others = parts
    for other in others:
        total = total + other
    return total


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a weight that is split over the ranks; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast("Tensor", to_local())


def _duration(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


class FollowingHost:
    """The host of every rank but the first: it computes the passes of each message and answers nothing.

    Tokens are drawn by the first rank alone. They come back with the next step, so that no rank depends on another
    one's draws.

    Args:
        host: this rank's.
    """

    runs_ahead = False

    def __init__(self, host: Scores) -> None:
        self._host = host

    def advance(self, at: Position, step: Step) -> None:
        self._host.advance(at, step)

    def values_at(
        self, at: Position, slots: Sequence[int], num_tokens: Sequence[int], proposal: Candidates | None
    ) -> Tensor:
        self._host.values_at(at, slots, num_tokens, proposal)
        return _nothing()

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        self._host.score(prompts, answer, weights)
        return _nothing()

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        return self._host.memory_budget(row_tokens)

    def resize(self, num_slots: int) -> None:
        self._host.resize(num_slots)

    def advance_and_propose(
        self, at: Position, step: Step, slots: Sequence[int], *, num_candidates: int | None, min_p: float
    ) -> Candidates:
        self._host.advance(at, step)
        return Candidates(None, _nothing(), _nothing(), _nothing())

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        self._host.advance(at, step)
        return Reply.of([])

    def work(self) -> HostWork:
        return HostWork(0, 0, 0.0, 0.0)


def _nothing() -> Tensor:
    return torch.empty(0)
