"""Count what the ranks of a tensor parallel host send each other, inside their processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import Position, Step, Terms, TokenOutcome

COLLECTIVES = ("c10d::", "_c10d_functional::")
SENDS_NOTHING = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


@dataclass(frozen=True, slots=True)
class CountingRanks:
    """Wraps the host of each rank, so that it counts; asked for `collectives`, it says what."""

    def __call__(self, host: Any) -> Any:
        return _CountingHost(host)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives and the bytes that this rank gives to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_calls = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith(COLLECTIVES) and name not in SENDS_NOTHING:
            self.num_calls += 1
            given = _tensors(args[1] if name == "c10d::allgather_" else args[0])
            self.num_bytes += sum(each.numel() * each.element_size() for each in given)
        return func(*args, **(kwargs or {}))


class _CountingHost:
    """Passes everything on to a host, and counts in steps that append tokens."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self._counter = _Counter()
        self._num_steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        if step.admissions or not step.slots:
            return self._sampled(at, step, slots, terms, uniforms)
        self._num_steps += 1
        with self._counter:
            return self._sampled(at, step, slots, terms, uniforms)

    def _sampled(self, *arguments: Any) -> Reply[list[TokenOutcome]]:
        reply: Reply[list[TokenOutcome]] = self._host.advance_and_sample(*arguments)
        return reply

    def collectives(self) -> tuple[int, int, int]:
        """Steps that were counted, collectives in them, and bytes that this rank gave to them."""
        return self._num_steps, self._counter.num_calls, self._counter.num_bytes


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, list | tuple) else []
