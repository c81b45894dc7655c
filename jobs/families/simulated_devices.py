"""Devices that are not there: tensors of a CPU that say they are on `simulated:0`, `simulated:1` and so on.

What is computed is computed by the CPU, with its bits. An operation on tensors of two devices is an error, as it is
with GPUs, and moving a tensor copies it. So a machine without GPUs shows whether a model can be spread over several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

KIND = "simulated"
CPU = torch.device("cpu")
MOVES = frozenset({"aten::to", "aten::_to_copy", "aten::copy_", "aten::lift", "aten::lift_fresh"})
TAKES_OTHER_INDICES = frozenset({"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"})


class SimulatedDevices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block, tensors can be made on simulated devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        _register()
        self._of_numbers = _TensorsOfNumbers()

    def __enter__(self) -> Any:
        self._of_numbers.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._of_numbers.__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _TensorsOfNumbers(TorchFunctionMode):
    """Makes tensors of numbers on the CPU and moves them: torch would write them to the device itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or device is None or torch.device(device).type != KIND:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": CPU}).to(device)


class SimulatedTensor(Tensor):
    """A tensor on a simulated device.

    Args:
        held: its numbers, on the CPU.
        device: where it says it is.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[SimulatedTensor], held: Tensor, device: torch.device) -> SimulatedTensor:
        with torch.inference_mode(mode=False):  # else it could not be used outside of it
            made: SimulatedTensor = Tensor._make_wrapper_subclass(
                cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
                device=device,
            )  # fmt: skip
        return made

    def __init__(self, held: Tensor, device: torch.device) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> SimulatedTensor:
        memo[id(self)] = copied = SimulatedTensor(self.held.clone(), self.device)
        return copied

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.held!r}, {self.device})"

    # torch would write these indices to the device itself

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    # these read memory without an operation

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute an operation on the CPU. Raises RuntimeError where its tensors are on several devices."""
    name: str = func._schema.name
    if name == "aten::_has_compatible_shallow_copy_type":
        return False  # a module gets new parameters when it is moved
    leaves = list(_leaves([*args, *kwargs.values()]))
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    if name not in MOVES:
        _check_devices(name, tensors)
    device = _device_of_result(func, args, leaves, tensors)
    given, named = [_on_cpu(each) for each in args], {key: _on_cpu(each) for key, each in kwargs.items()}
    if name == "aten::histc":  # of whole numbers a GPU computes it, and a CPU does not
        found = func(given[0].double(), *given[1:], **named).to(given[0].dtype)
    else:
        found = func(*given, **named)
    if name == "aten::to" and tensors[0].device != device:
        found = found.clone()
    if func._schema.is_mutable and func._schema.returns:
        return _changed(func, args, kwargs)
    if device.type != KIND:
        return found
    return _wrapped(found, device)


def _check_devices(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError for tensors of several devices. Single numbers and indices may be on the CPU."""
    on = {each.device for each in tensors if each.device.type == KIND}
    if on and name not in TAKES_OTHER_INDICES:
        on |= {each.device for each in tensors if each.ndim and each.device.type != KIND}
    if len(on) > 1:
        raise RuntimeError(f"{name}: all tensors must be on one device; found {', '.join(sorted(map(str, on)))}")


def _device_of_result(
    func: Any, args: Sequence[Any], leaves: Sequence[Any], tensors: Sequence[Tensor]
) -> torch.device:
    stated = [each for each in leaves if isinstance(each, torch.device)]
    if func._schema.name == "aten::to" and func._overloadname == "other":
        stated = [args[1].device]
    elif func._schema.name == "aten::copy_":
        stated = [args[0].device]
    device = (stated or [each.device for each in tensors if each.device.type == KIND] or [CPU])[0]
    return torch.device(KIND, 0) if device.type == KIND and device.index is None else device


def _indices(index: Any) -> Any:
    """An index whose lists are tensors of the CPU."""
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    if not isinstance(index, list):
        return index
    return torch.tensor(index, dtype=None if index else torch.long)


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for each in values:
        if isinstance(each, list | tuple):
            yield from _leaves(each)
        else:
            yield each


def _on_cpu(value: Any) -> Any:
    if isinstance(value, SimulatedTensor):
        return value.held
    if isinstance(value, list | tuple):
        return [_on_cpu(each) for each in value]
    return CPU if isinstance(value, torch.device) and value.type == KIND else value


def _wrapped(found: Any, device: torch.device) -> Any:
    if isinstance(found, Tensor):
        return SimulatedTensor(found, device)
    return type(found)(_wrapped(each, device) for each in found) if isinstance(found, list | tuple) else found


def _changed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument that an operation changes in place, which is what it returns."""
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[at] if at < len(args) else kwargs[argument.name]
    raise AssertionError(func)


def simulated(index: int) -> torch.device:
    """A simulated device."""
    _register()
    return torch.device(KIND, index)


@cache
def _register() -> None:
    """Make torch know the kind of device; once a process, as it can have one such kind.

    Nobody else is to use it: torch is told that there is none.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return False

        def has_primary_context(self, index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    _setup_privateuseone_for_python_backend(KIND, backend_module=_NoDevices(), hook=Hook())


class _NoDevices:
    """What torch asks a kind of device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing: the CPU draws."""

    def device_count(self) -> int:
        return 0
