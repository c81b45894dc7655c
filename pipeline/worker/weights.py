"""Weights from files into models, whole or not at all.

transformers and peft fill what a file lacks with random numbers, or leave it out, with a warning at most. Here every
weight of a model comes from its files and every weight in the files has its place in the model; otherwise the run
does not begin, and the message names the first of them.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import reason_of
from pipeline.hub.sources import fetch_weights
from pipeline.hub.weight_files import LocalTree, find_model_files, shapes_in
from pipeline.protocol.specs import HostSpec
from pipeline.worker.first_layers import keep_first_layers, without_later_layers, without_load_report
from pipeline.worker.quantised import compute_in_stated_type, is_plain, quantised_options
from pipeline.worker.ranks import local_part

# what wrappers put before or into the names of a model's weights, where the wrapped model is saved
WRAPPERS = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
MODELS_OWN = ("module.",)  # also the name of a part in some models: a wrapper's only where all names begin with it
SHOWN = 5
CPU = torch.device("cpu")
# what transformers raises for a checkpoint that it cannot read, packages of quantised ones that are missing included
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError)


# reads names and shapes alone, where transformers can: it asks for accelerate then
_WITHOUT_NUMBERS = {"device_map": "meta"} if find_spec("accelerate") else {}


def load_causal_lm(spec: HostSpec, *, dtype: torch.dtype, device: torch.device = CPU) -> Any:
    """A causal LM in eval mode with all of its weights from its files: on the CPU, quantised ones on the device.

    Of a checkpoint that also sees or hears, the class that reads all of the text part's weights is taken.

    Raises:
        ConfigurationError: the checkpoint cannot be read, or lacks weights, or has others.
    """
    options = quantised_options(spec.source, device, dtype)
    folder = fetch_weights(spec.source, cache_folder=spec.cache_folder)
    config, sharding = _read_config(spec, folder), sharding_of(spec, folder)
    if spec.layers is not None:
        keep_first_layers(config, spec.layers)
        options = {**options, "config": config}
    loaders: list[Any] = []
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or spec.source.trust_remote_code:
        loaders.append(AutoModelForCausalLM)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        loaders.append(AutoModelForImageTextToText)
    found: list[_Faults] = []
    for loader in loaders or [AutoModelForCausalLM]:  # which says what it can read
        with nullcontext() if spec.layers is None else without_load_report():
            model, report = _read(spec, loader, folder, dtype=dtype, **options, **sharding)
        if spec.layers is not None:
            report = without_later_layers(report, spec.layers)
        faults = _Faults.of(report, model)
        if faults.are_unexpected_alone and loader is not loaders[-1]:
            # of parts that see or hear, where the class that has them all has a place for all
            whole, report_of_whole = _read(spec, loaders[-1], folder, dtype=dtype, **(options | _WITHOUT_NUMBERS))
            if spec.layers is not None:
                report_of_whole = without_later_layers(report_of_whole, spec.layers)
            faults = _Faults.of({**report, "unexpected_keys": report_of_whole["unexpected_keys"]}, whole)
        if not faults:
            for tower in towers_of(model).values():
                for parameter in tower.parameters():
                    if is_plain(parameter):  # quantised ones cannot be cut
                        parameter.data = parameter.data.new_empty(0)  # nothing reads it, and it may be large
            return model
        found.append(faults)
    raise ConfigurationError(f"{spec.title}: {min(found, key=len)}")


def describe_faults(report: Mapping[str, Any], model: Any) -> str | None:
    """What transformers' loading report on a model says that must not be."""
    return str(_Faults.of(report, model)) or None


def names_besides_text(model: Any) -> frozenset[str]:
    """The names of a composite model's weights that its text is not computed with."""
    if not is_composite(model.config):
        return frozenset()
    parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    of_text = {
        id(tensor) for part in parts if part is not None for tensor in part.state_dict(keep_vars=True).values()
    }
    return frozenset(name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in of_text)


def towers_of(model: Any) -> dict[str, PreTrainedModel]:
    """The models inside a composite one that see or hear, by their place in it."""
    besides = names_besides_text(model)
    return {
        place: part
        for place, part in model.named_modules()
        if place
        and isinstance(part, PreTrainedModel)
        and all(f"{place}.{name}" in besides for name in part.state_dict())
    }


def is_composite(config: Any) -> bool:
    """Whether a configuration has parts beside its text."""
    return any(name.endswith("_config") and name != "text_config" for name in getattr(config, "sub_configs", {}))


def sharding_of(spec: HostSpec, folder: Path) -> dict[str, Any]:
    """Options of `from_pretrained` that split a host's weights over its ranks. Raises ConfigurationError."""
    if spec.tensor_parallel == 1:
        return {}
    from pipeline.worker.sharding import from_pretrained_options  # transformers' plans, for ranks alone

    return from_pretrained_options(_read_config(spec, folder), spec.tensor_parallel, is_strict=spec.strict)


def _read_config(spec: HostSpec, folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=spec.source.trust_remote_code)
    except UNREADABLE as error:
        raise ConfigurationError(f"{spec.title}: {reason_of(error)}") from error


def _read(
    spec: HostSpec, loader: Any, folder: Path, *, dtype: torch.dtype, **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    return read_with_report(
        spec.title, loader, folder, dtype=dtype, trust_remote_code=spec.source.trust_remote_code, **options
    )


def read_with_report(
    title: str, loader: Any, folder: Path, *, dtype: torch.dtype, trust_remote_code: bool, **more: Any
) -> tuple[Any, Mapping[str, Any]]:
    """A model by one of transformers' classes, and transformers' report on its weights.

    Names that wrappers of training have changed are understood, and a warning says so. Other options are those of
    `from_pretrained`, such as what `quantised_options` gives.

    Raises:
        ConfigurationError: the checkpoint cannot be read.
    """
    wrappers = _find_wrappers(_weight_names(folder), title)
    if wrappers:
        warnings.warn(
            f"{title}: its files hold the weights of a model that was wrapped by "
            f"{' and '.join(dict.fromkeys(wrappers.values()))}; what that added to their names is left out",
            RuntimeWarning,
            stacklevel=2,
        )
    options = {"key_mapping": dict.fromkeys(wrappers, "")} if wrappers else {}
    try:
        model, report = loader.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report has their names, transformers' error has not
            **options,
            **more,
        )
    except UNREADABLE as error:
        raise ConfigurationError(f"{title}: {reason_of(error)}") from error
    compute_in_stated_type(model)
    return model, report


def why_not_finite(model: Any, which: str = "") -> str | None:
    """Which of a model's weights are NaN or infinite, if any are.

    Args:
        model: with its weights on its device.
        which: only those whose names have this part.
    """
    parameters = {name for name, _ in model.named_parameters()}
    names = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if which in name and not _is_finite(tensor.detach(), may_be_infinite=name not in parameters)
    ]
    return f"its files hold {listed(names)} with numbers that are NaN or infinite" if names else None


def _is_finite(tensor: Tensor, *, may_be_infinite: bool) -> bool:
    """Whether a tensor has no NaN, and nothing infinite unless that is allowed: masks among a model's buffers."""
    tensor = local_part(tensor)  # first: a part of a split weight is an ordinary tensor, the whole is not
    if not is_plain(tensor):
        return True
    # a sum is the cheapest look at all numbers; that of large finite ones may be infinite, too
    if bool(tensor.sum(dtype=torch.float32).isfinite()):
        return True
    return not bool(tensor.isnan().any() if may_be_infinite else (~tensor.isfinite()).any())


def _weight_names(folder: Path) -> list[str]:
    """The names of a checkpoint's weights, of the files that transformers reads."""
    files = find_model_files(LocalTree(folder)).weights
    return [name for file in files for name in shapes_in(folder / file)]


def _find_wrappers(names: Sequence[str], title: str) -> dict[str, str]:
    """What wrappers left in the names of weights: patterns of it, each in a name once, with the wrappers' own names.

    Raises:
        ConfigurationError: without it, two weights would have one name.
    """
    found: dict[str, str] = {}
    leading: list[str] = []
    while names:
        start = "".join(leading)
        mark = next((each for each in WRAPPERS if all(name.startswith(start + each) for name in names)), None)
        if mark is None:
            break
        leading.append(mark)
    prefix = "".join(leading)
    if leading:
        found[f"^{re.escape(prefix)}"] = " and ".join(dict.fromkeys(WRAPPERS[mark] for mark in leading))
    for mark, who in WRAPPERS.items():
        if mark not in MODELS_OWN and any(f".{mark}" in f".{name.removeprefix(prefix)}" for name in names):
            found[rf"(?<![^.]){re.escape(mark)}"] = who
    read_as = Counter(_without(found, name) for name in names)
    if twice := sorted(name for name, count in read_as.items() if count > 1):
        left_by = " and ".join(found.values())
        raise ConfigurationError(f"{title}: its files hold {listed(twice)} twice, the names as {left_by} leaves them")
    return found


def _without(patterns: Iterable[str], name: str) -> str:
    for pattern in patterns:
        name = re.sub(pattern, "", name, count=1)
    return name


@dataclass(frozen=True, slots=True)
class _Faults:
    """What transformers' loading report says that must not be: names of weights."""

    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Sequence[tuple[str, list[int], list[int]]]

    @classmethod
    def of(cls, report: Mapping[str, Any], model: Any) -> _Faults:
        """The faults of a report, but for weights of parts that see or hear."""
        besides, places = names_besides_text(model), tuple(f"{place}." for place in towers_of(model))
        mismatched = [each for each in report["mismatched_keys"] if each[0] not in besides]
        return cls(
            sorted(report["missing_keys"] - {name for name, *_ in report["mismatched_keys"]} - besides),
            sorted(name for name in report["unexpected_keys"] if not name.startswith(places)),
            sorted((name, list(stored), list(own)) for name, stored, own in mismatched),
        )

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    @property
    def are_unexpected_alone(self) -> bool:
        """Whether nothing is wrong but that the files hold more."""
        return bool(self.unexpected) and not (self.missing or self.mismatched)

    def __str__(self) -> str:
        faults = []
        if self.missing:
            faults.append(f"its files lack {listed(self.missing)}, which would be random")
        if self.unexpected:
            faults.append(f"its files hold {listed(self.unexpected)}, which the model has no place for")
        if self.mismatched:
            shown = [f"{name} {stored}, not {own}" for name, stored, own in self.mismatched]
            faults.append(f"another shape than its configuration says: {listed(shown)}")
        return "; ".join(faults)


def listed(names: Sequence[str]) -> str:
    """The number of some weights and the first of their names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' * (len(names) != 1)} ({', '.join(names[:SHOWN])}{more})"
