"""LoRA adapters from their files onto a model, whole or not at all, and without a change to the model itself.

peft makes random numbers of what an adapter's file lacks, leaves out what matches nothing, and writes embeddings that
are saved beside an adapter over the model's own; a warning at most says so. Here each of these is looked for: what
would change the model before an adapter is loaded, what would be used in part after that.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import reason_of
from pipeline.hub.preference_adapters import PreferenceForm, write_as_lora
from pipeline.hub.sources import AdapterSource, fetch_weights
from pipeline.hub.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LocalTree, read_json, shapes_in
from pipeline.protocol.specs import HostSpec
from pipeline.worker.adapters import without_peft_warnings
from pipeline.worker.layer_devices import devices_of
from pipeline.worker.weights import UNREADABLE, listed

PEFT_PREFIX = "base_model.model."  # of every name in an adapter's file


def add_adapters(model: Any, spec: HostSpec) -> Any:
    """The model with all adapters of a host, as peft's.

    Raises:
        ConfigurationError: an adapter cannot be read, is not used whole, or would change the model.
    """
    from peft import PeftModel  # seven seconds of import, for those who use adapters

    device, own = model.device, dict(model.named_parameters(remove_duplicate=False))
    for name, adapter in spec.adapters.items():
        with _as_lora(adapter, fetch_weights(adapter, cache_folder=spec.cache_folder)) as folder:
            title = f"{spec.title}: adapter {adapter.name}"
            _check_before(own, folder, title)
            try:
                with without_peft_warnings():
                    if isinstance(model, PeftModel):
                        model.load_adapter(folder, adapter_name=name)
                    else:
                        model = PeftModel.from_pretrained(model, folder, adapter_name=name)
            except UNREADABLE as error:
                raise ConfigurationError(f"{title}: {reason_of(error)}") from error
            _check_after(model, name, own, folder, title)
    is_spread = len(devices_of(model)) > 1  # then peft has put the weights of an adapter beside those of its layer
    return (model if is_spread else model.to(device)).eval()


def at_own_preference(spec: HostSpec) -> dict[str, PreferenceForm]:
    """The forms of those adapters of a host that are used at the preference vector of each row, by name."""
    return {
        name: adapter.form
        for name, adapter in spec.adapters.items()
        if adapter.form is not None and adapter.objective is None
    }


@contextmanager
def _as_lora(adapter: AdapterSource, folder: Path) -> Iterator[Path]:
    """The folder; of an adapter that depends on a preference vector a folder with an equal LoRA, while it is read."""
    if adapter.form is None:
        yield folder
        return
    with TemporaryDirectory() as temporary:
        write_as_lora(folder, Path(temporary), objective=adapter.objective)
        yield Path(temporary)


def _check_before(own: Mapping[str, Tensor], folder: Path, title: str) -> None:
    """Refuse an adapter that would change the model itself, or lacks a module that it says it brings as a whole.

    Args:
        own: the model's weights by name.
        folder: of the adapter's files.
        title: names the host and the adapter in the message.

    Raises:
        ConfigurationError: with the first names and their number.
    """
    config = read_json(LocalTree(folder), ADAPTER_CONFIG)
    _refuse_unknown(config, title)
    shapes = shapes_in(folder / ADAPTER_WEIGHTS)
    if not shapes:
        raise ConfigurationError(f"{title} cannot be used whole: its file holds no weights")
    brought = [str(module) for module in config.get("modules_to_save") or ()]
    whole = [name for name in own if _is_within(name, brought)]
    if not config.get("ensure_weight_tying") and (
        missing := sorted({PEFT_PREFIX + name for name in whole} - shapes.keys())
    ):
        raise ConfigurationError(f"{title} cannot be used whole: its file lacks {listed(missing)}")
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        other = [
            name
            for name in _models_own(shapes, own)
            if name not in whole and not _is_same(file.get_tensor(PEFT_PREFIX + name), own[name])
        ]
    if other:
        raise ConfigurationError(
            f"{title} brings {listed(other)} of the model itself, as save_embedding_layers does, with other values "
            "than the model's; they would change the base and all adapters. Merge the adapter into its model (peft's "
            "merge_and_unload) and name that as a model"
        )


def _refuse_unknown(config: Mapping[str, Any], title: str) -> None:
    """Refuse settings that the installed peft leaves out with a warning: a newer one computes something else."""
    import peft

    known = {each.name for each in fields(peft.LoraConfig)}
    if unknown := [f"{key}: {str(config[key])[:40]}" for key in sorted(config.keys() - known) if config[key]]:
        raise ConfigurationError(
            f"{title}: {ADAPTER_CONFIG} has {', '.join(unknown)}, which peft {peft.__version__} does not know; "
            "install the version that made it, or delete what changes nothing"
        )


def _check_after(model: Any, name: str, own: Container[str], folder: Path, title: str) -> None:
    """Refuse an adapter that is not used whole: names that match nothing, and weights that its own targets lack.

    Args:
        model: peft's, with the adapter loaded.
        name: of the adapter in it.
        own: names of the model's own weights.
        folder: of the adapter's files.
        title: names the host and the adapter in the message.

    Raises:
        ConfigurationError: with the first names and their number.
    """
    from peft import get_peft_model_state_dict

    with without_peft_warnings():
        of_adapter = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wanted = {key: tuple(value.shape) for key, value in of_adapter.items()}
    shapes = shapes_in(folder / ADAPTER_WEIGHTS)
    beside = {PEFT_PREFIX + each for each in _models_own(shapes, own)} - wanted.keys()
    # beside an adapter of the embeddings peft also writes the embeddings themselves
    found = {key: shape for key, shape in shapes.items() if ".base_layer." not in key and key not in beside}
    faults = []
    if missing := sorted(wanted.keys() - found.keys()):
        faults.append(f"its file lacks {listed(missing)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        faults.append(f"nothing in the model matches {listed(unknown)}")
    if other := sorted(key for key in wanted.keys() & found.keys() if wanted[key] != found[key]):
        faults.append(f"another shape than in the model: {listed(other)}")
    if faults:
        raise ConfigurationError(f"{title} cannot be used whole: {'; '.join(faults)}")


def _models_own(names: Mapping[str, Any], own: Container[str]) -> list[str]:
    """Weights in an adapter's file that are named as the model's own are, by their names in the model."""
    without_prefix = sorted(name.removeprefix(PEFT_PREFIX) for name in names if name.startswith(PEFT_PREFIX))
    return [name for name in without_prefix if name in own]


def _is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether a weight lies in one of the modules, which peft finds by the ends of their names."""
    paths = accumulate(name.split(".")[:-1], "{}.{}".format)
    return any(path.endswith(module) for path in paths for module in modules)


def _is_same(stored: Tensor, own: Tensor) -> bool:
    """Whether a stored weight is the model's, in the type that the model has."""
    return stored.shape == own.shape and torch.equal(stored.to(own), own)
