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
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import reason_of
from pipeline.hub.sources import fetch_weights
from pipeline.hub.weight_files import LocalTree, find_model_files, shapes_in
from pipeline.protocol.specs import HostSpec

# what wrappers put before or into the names of a model's weights, where the wrapped model is saved
WRAPPERS = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
MODELS_OWN = ("module.",)  # also the name of a part in some models: a wrapper's only where all names begin with it
SHOWN = 5
# what transformers raises for a checkpoint that it cannot read, packages of quantised ones that are missing included
UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError)


def load_causal_lm(spec: HostSpec, *, dtype: torch.dtype) -> Any:
    """A causal LM in eval mode, on the CPU, with all of its weights from its files.

    Of a checkpoint that also sees or hears, the class that reads all of the text part's weights is taken.

    Raises:
        ConfigurationError: the checkpoint cannot be read, or lacks weights, or has others.
    """
    folder = fetch_weights(spec.source, cache_folder=spec.cache_folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.source.trust_remote_code)
    except UNREADABLE as error:
        raise ConfigurationError(f"{spec.title}: {reason_of(error)}") from error
    loaders: list[Any] = []
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or spec.source.trust_remote_code:
        loaders.append(AutoModelForCausalLM)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        loaders.append(AutoModelForImageTextToText)
    faults: list[str] = []
    for loader in loaders or [AutoModelForCausalLM]:  # which says what it can read
        model, fault = load_whole(spec, loader, folder, dtype=dtype)
        if fault is None:
            return model
        faults.append(fault)
    raise ConfigurationError(f"{spec.title}: {faults[0]}")


def load_whole(spec: HostSpec, loader: Any, folder: Path, *, dtype: torch.dtype) -> tuple[Any, str | None]:
    """A model by one of transformers' classes, and what is wrong with its weights, if anything is.

    Raises:
        ConfigurationError: the checkpoint cannot be read.
    """
    model, report = read_with_report(
        spec.title, loader, folder, dtype=dtype, trust_remote_code=spec.source.trust_remote_code
    )
    return model, describe_faults(report, is_composite=is_composite(model.config))


def read_with_report(
    title: str, loader: Any, folder: Path, *, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Mapping[str, Any]]:
    """A model by one of transformers' classes, and transformers' report on its weights.

    Names that wrappers of training have changed are understood, and a warning says so.

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
        )
    except UNREADABLE as error:
        raise ConfigurationError(f"{title}: {reason_of(error)}") from error
    return model, report


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


def is_composite(config: Any) -> bool:
    """Whether a configuration has parts beside its text: their weights are not read."""
    return any(name.endswith("_config") and name != "text_config" for name in getattr(config, "sub_configs", {}))


def describe_faults(report: Mapping[str, Any], *, is_composite: bool) -> str | None:
    """What transformers' loading report says that must not be."""
    faults = []
    if missing := sorted(report["missing_keys"] - {name for name, *_ in report["mismatched_keys"]}):
        faults.append(f"its files lack {listed(missing)}, which would be random")
    unexpected = sorted(report["unexpected_keys"])
    if unexpected and not (is_composite and not missing):
        faults.append(f"its files hold {listed(unexpected)}, which the model has no place for")
    if mismatched := sorted((name, list(stored), list(own)) for name, stored, own in report["mismatched_keys"]):
        shown = [f"{name} {stored}, not {own}" for name, stored, own in mismatched]
        faults.append(f"another shape than its configuration says: {listed(shown)}")
    return "; ".join(faults) or None


def listed(names: Sequence[str]) -> str:
    """The number of some weights and the first of their names."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' * (len(names) != 1)} ({', '.join(names[:SHOWN])}{more})"
