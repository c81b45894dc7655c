"""The layers of one model on several devices of one process, each with a range of them.

A layer's inputs are moved to its device when it is called, and what the last layer gives is moved back to the first
device. What a model holds beside its layers is there: embeddings, rotations, norms, the head. Between the layers
hidden states lie on the device of the layer that gave them. So all that runs the model sees one device, but a model's
own code between layers that brings both together fails; the passes at load show that, and the model is refused. What
is called by a layer moves what it needs itself, and what a pass keeps of a layer is on the layer's device.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigurationError
from pipeline.protocol.spread import spread


def place_model(model: Any, devices: Sequence[torch.device], title: str) -> Any:
    """Put a model on its device, or its layers on several. Returns the model.

    Args:
        model: of transformers, with ordinary weights where there are several devices.
        devices: the first is where its inputs have to be, and its outputs will be.
        title: names the model in messages.

    Raises:
        ConfigurationError: it has fewer layers than there are devices.
    """
    home, *others = devices
    if not others:
        return model.to(home)
    layers = _layers_of(model)
    if len(layers) < len(devices):
        raise ConfigurationError(
            f"{title}: pipeline_parallel must be at most the number of its layers, {len(layers)}; got {len(devices)}"
        )
    layer_bytes = [_num_bytes(layer) for layer in layers]
    counts = spread(layer_bytes, len(devices), first_bytes=_num_bytes(model) - sum(layer_bytes))
    of_layers = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    place = dict.fromkeys(map(id, model.modules()), home)
    for layer, device in zip(layers, of_layers, strict=True):
        place.update(dict.fromkeys(map(id, layer.modules()), device))
        layer.register_forward_pre_hook(_InputsTo(device), with_kwargs=True)
    layers[-1].register_forward_hook(_OutputTo(home))
    _move(model, place)
    return model


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices of a model's weights, in the order of its layers."""
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))


def _layers_of(model: Any) -> nn.ModuleList:
    """The layers that read text: of the lists of modules the one with the most weights, of models that also see or
    hear inside their decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    lists = _lists_in(decoder) or _lists_in(model) or [nn.ModuleList()]
    return max(lists, key=_num_bytes)


def _lists_in(module: nn.Module) -> list[nn.ModuleList]:
    """Lists of modules that are in no other list."""
    found = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    inner = {id(part) for each in found for layer in each for part in layer.modules()}
    return [each for each in found if id(each) not in inner]


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _move(model: nn.Module, place: dict[int, torch.device]) -> None:
    """Move the weights and buffers of every module to its device; shared ones are copied for each that needs them."""
    users: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, name))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(place[id(module)])
    for shared in users.values():
        parameter = getattr(*shared[0])
        moved: dict[torch.device, nn.Parameter] = {}
        for module, name in shared:
            device = place[id(module)]
            if device not in moved:
                moved[device] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
            setattr(module, name, moved[device])
        del parameter  # one weight at a time is in memory twice


class _InputsTo:
    """A hook that moves what a layer is called with to its device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return _moved(args, self._device), _moved(kwargs, self._device)


class _OutputTo:
    """A hook that moves what a layer gives to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _moved(output, self._device)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors on a device, also those in lists and mappings, which change in place: layers share what they hold.

    A cache is left as it is: what it keeps of a layer is on the layer's device.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [_moved(each, device) for each in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if isinstance(value, MutableMapping):
        for key, each in list(value.items()):
            value[key] = _moved(each, device)
    elif isinstance(value, list):
        value[:] = [_moved(each, device) for each in value]
    return value
