"""Weights from files into models, whole or not at all.

transformers and peft fill what a file lacks with random numbers, or leave it out, with a warning at most. Here every
weight of a model comes from its files and every weight in the files has its place in the model; otherwise the run
does not begin, and the message names the first of them.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
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
from pipeline.protocol.specs import HostSpec
from pipeline.worker.adapters import without_peft_warnings

WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel"}  # prefixes that they leave on names
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
    config = _read(spec, AutoConfig, folder)
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
    """A model by one of transformers' classes, and what is wrong with its weights, if anything is."""
    prefix = _common_prefix(folder)
    if prefix:
        who = " and ".join(name for mark, name in WRAPPERS.items() if mark in prefix)
        warnings.warn(
            f"{spec.title}: names of weights begin with {prefix}, as {who} leaves them; they are read without it",
            RuntimeWarning,
            stacklevel=2,
        )
    options = {"key_mapping": {f"^{re.escape(prefix)}": ""}} if prefix else {}
    model, report = _read(
        spec, loader, folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    return model, _describe_faults(report, is_composite=_is_composite(model.config))


def check_adapter(model: Any, name: str, folder: Path, title: str) -> None:
    """Refuse an adapter that is not used whole: names that match nothing, and weights that its own targets lack.

    Args:
        model: peft's, with the adapter loaded.
        name: of the adapter in it.
        folder: of its files.
        title: names the host in the message.

    Raises:
        ConfigurationError: with the first names and their number.
    """
    from peft import get_peft_model_state_dict

    with without_peft_warnings():
        of_adapter = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wanted = {key: tuple(value.shape) for key, value in of_adapter.items()}
    # beside an adapter of the embeddings peft also writes the embeddings themselves
    found = {key: shape for key, shape in tensor_shapes(folder).items() if ".base_layer." not in key}
    faults = []
    if missing := sorted(wanted.keys() - found.keys()):
        faults.append(f"its file lacks {_listed(missing)}")
    if unknown := sorted(found.keys() - wanted.keys()):
        faults.append(f"nothing in the model matches {_listed(unknown)}")
    if other := sorted(key for key in wanted.keys() & found.keys() if wanted[key] != found[key]):
        faults.append(f"other shapes than the model's have {_listed(other)}")
    if faults or not found:
        what = "; ".join(faults) or "its file holds no weights"
        raise ConfigurationError(f"{title}: the adapter in {folder} cannot be used whole: {what}")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a folder's safetensors files, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _read(spec: HostSpec, loader: Any, folder: Path, **options: Any) -> Any:
    try:
        return loader.from_pretrained(folder, trust_remote_code=spec.source.trust_remote_code, **options)
    except UNREADABLE as error:
        raise ConfigurationError(f"{spec.title}: {reason_of(error)}") from error


def _common_prefix(folder: Path) -> str:
    """What wrappers left before every name of a checkpoint's weights; empty where they left nothing."""
    names = list(tensor_shapes(folder))
    prefix = ""
    while names:
        mark = next((each for each in WRAPPERS if all(name.startswith(prefix + each) for name in names)), None)
        if mark is None:
            break
        prefix += mark
    return prefix


def _is_composite(config: Any) -> bool:
    """Whether a configuration has parts beside its text: their weights are not read."""
    return any(name.endswith("_config") and name != "text_config" for name in getattr(config, "sub_configs", {}))


def _describe_faults(report: Mapping[str, Any], *, is_composite: bool) -> str | None:
    """What transformers' loading report says that must not be."""
    faults = []
    if missing := sorted(report["missing_keys"]):
        faults.append(f"its files lack {_listed(missing)}, which would be random")
    unexpected = sorted(report["unexpected_keys"])
    if unexpected and not (is_composite and not missing):
        faults.append(f"its files hold {_listed(unexpected)}, which the model has no place for")
    if mismatched := sorted(str(each[0]) for each in report.get("mismatched_keys", ())):
        faults.append(f"other shapes than the model's have {_listed(mismatched)}")
    return "; ".join(faults) or None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} weight{'s' * (len(names) != 1)} ({', '.join(names[:SHOWN])}{more})"
