"""The files of a model, local or remote: which ones count, what they hold, and a fingerprint that is cheap to take.

Nothing here loads weights: a header and half a kilobyte of each tensor are read, of tens of gigabytes too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import ConfigurationError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINING_FACTS = "training.json"  # what `cage train` states beside an adapter
VALUE_HEAD = "value_head.safetensors"  # a head on the hidden states, beside a model or an adapter
SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # what transformers reads besides the weights
LEFTOVERS = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
SAMPLE_BYTES = 512
MAX_SAMPLES = 4096  # of one file; a dense model of 80 layers has about 720 tensors
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

Span = tuple[str, int, int]  # file name, first byte, byte after the last


class FileTree(Protocol):
    """One folder's files, without subfolders."""

    @property
    def address(self) -> str: ...

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size in bytes by file name."""
        ...

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        """The bytes of many spans, in order."""
        ...


@dataclass(frozen=True, slots=True)
class LocalTree:
    """A folder of this machine."""

    folder: Path

    @property
    def address(self) -> str:
        return str(self.folder)

    @property
    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir()) if path.is_file()}

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        handles = {name: (self.folder / name).open("rb", buffering=0) for name in {span[0] for span in spans}}
        try:
            blocks = []
            for name, start, stop in spans:
                handles[name].seek(start)
                blocks.append(handles[name].read(stop - start))
            return blocks
        finally:
            for handle in handles.values():
                handle.close()


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files that make up a model, of all that a folder may hold."""

    small: tuple[str, ...]
    weights: tuple[str, ...]
    heads: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.small, *self.weights, *self.heads)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the files hold.

    Attributes:
        num_parameters_by_dtype: as stored, by safetensors' dtype names ("BF16").
        identity: equal for equal files, wherever they are.
    """

    num_parameters_by_dtype: Mapping[str, int]
    identity: str


def find_model_files(tree: FileTree, *, with_code: bool = False) -> ModelFiles:
    """A causal LM's files. `with_code` counts Python files too (trust_remote_code).

    Raises:
        ConfigurationError: it is no model, has no safetensors weights, or some of them are missing.
    """
    sizes = tree.sizes
    if CONFIG not in sizes:
        hint = " It is a LoRA adapter: name it under adapter, not model, or merge it into its model."
        hint = hint if ADAPTER_CONFIG in sizes else ""
        raise ConfigurationError(f"{tree.address} has no {CONFIG}, so it is no model.{hint} {_contents(sizes)}")
    refuse_adapter_beside(tree.address, sizes)
    suffixes = (*SMALL, ".py") if with_code else SMALL
    small = tuple(sorted(name for name in sizes if name.endswith(suffixes) and name not in LEFTOVERS))
    return ModelFiles(small, _weight_files(tree, sizes), _heads(sizes))


def find_adapter_files(tree: FileTree) -> ModelFiles:
    """A PEFT adapter's files. Raises ConfigurationError where the folder holds no safetensors adapter."""
    sizes = tree.sizes
    if ADAPTER_CONFIG not in sizes:
        raise ConfigurationError(f"{tree.address} has no {ADAPTER_CONFIG}, so it is no adapter. {_contents(sizes)}")
    if ADAPTER_WEIGHTS not in sizes:
        raise _no_weights(tree.address, sizes, ADAPTER_WEIGHTS)
    return ModelFiles((ADAPTER_CONFIG,), (ADAPTER_WEIGHTS,), _heads(sizes))


def _heads(sizes: Container[str]) -> tuple[str, ...]:
    return (VALUE_HEAD,) if VALUE_HEAD in sizes else ()


def refuse_adapter_beside(address: str, names: Container[str]) -> None:
    """Refuse a model's files with an adapter among them: transformers adds it to the model without a word.

    Raises:
        ConfigurationError: with what to do.
    """
    if ADAPTER_CONFIG in names:
        raise ConfigurationError(
            f"{address} holds a model and a LoRA adapter, which transformers would add to it. Move {ADAPTER_CONFIG} "
            f"and {ADAPTER_WEIGHTS} to a folder of their own and name that under adapter; delete them if they are "
            f"merged"
        )


def read_json(tree: FileTree, name: str) -> dict[str, Any]:
    """A JSON file of the tree. Raises ConfigurationError naming it where it is not one."""
    [block] = tree.read([(name, 0, tree.sizes[name])])
    try:
        value = json.loads(block)
    except ValueError as error:
        raise ConfigurationError(f"{tree.address}/{name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigurationError(f"{tree.address}/{name} must hold a JSON object")
    return value


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file, by name."""
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def take_inventory(tree: FileTree, files: ModelFiles) -> Inventory:
    """Count parameters and fingerprint the files: the small ones whole, of the weights the header and samples.

    Raises:
        ConfigurationError: a weight file is damaged or cut off.
    """
    sizes = tree.sizes
    digest = hashlib.sha256()
    blocks = tree.read([(name, 0, sizes[name]) for name in files.small])
    for name, block in zip(files.small, blocks, strict=True):
        digest.update(f"{name} {hashlib.sha256(block).hexdigest()}\n".encode())
    num_parameters: Counter[str] = Counter()
    for name in (*files.weights, *files.heads):
        raw, header = _read_header(tree, name, sizes[name])
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        for tensor in tensors.values():
            num_parameters[tensor["dtype"]] += math.prod(tensor["shape"])
        digest.update(f"{name} {sizes[name]} {hashlib.sha256(raw).hexdigest()}\n".encode())
        for sample in tree.read(_sample_spans(name, len(raw) + 8, tensors)):
            digest.update(sample)
    return Inventory(dict(num_parameters), f"sha256:{digest.hexdigest()[:32]}")


def _weight_files(tree: FileTree, sizes: Mapping[str, int]) -> tuple[str, ...]:
    if WEIGHTS in sizes:
        return (WEIGHTS,)
    if INDEX not in sizes:
        raise _no_weights(tree.address, sizes, f"{WEIGHTS} or {INDEX}")
    parts = index_parts(read_json(tree, INDEX), f"{tree.address}/{INDEX}")
    if missing := [name for name in parts if name not in sizes]:
        raise ConfigurationError(f"{tree.address} lacks weights that its {INDEX} names: {_listed(missing)}")
    return parts


def index_parts(index: Mapping[str, Any], address: str) -> tuple[str, ...]:
    """The weight files that an index names, without folders. Raises ConfigurationError where it names none."""
    weight_map = index.get("weight_map")
    parts = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    if not parts or not all(isinstance(name, str) and Path(name).name == name for name in parts):
        raise ConfigurationError(f"{address} has no usable weight_map")
    return tuple(parts)


def _no_weights(address: str, sizes: Mapping[str, int], wanted: str) -> ConfigurationError:
    if pickled := [name for name in sizes if name.endswith(PICKLED)]:
        return ConfigurationError(
            f"{address} has its weights only as {_listed(pickled)}: such files can run code when they are read, "
            f"so they are refused. `cage convert FOLDER` writes safetensors beside them without running anything"
        )
    return ConfigurationError(f"{address} has no weights ({wanted}). {_contents(sizes)}")


def _read_header(tree: FileTree, name: str, size: int) -> tuple[bytes, dict[str, Any]]:
    """The JSON header of a safetensors file: eight bytes of length, then the header. The file must be whole."""
    damaged = ConfigurationError(f"{tree.address}/{name} is not a whole safetensors file ({size} bytes)")
    [start] = tree.read([(name, 0, min(8, size))])
    num_bytes = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= num_bytes <= min(MAX_HEADER_BYTES, size - 8):
        raise damaged
    [raw] = tree.read([(name, 8, 8 + num_bytes)])
    try:
        header = json.loads(raw)
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise damaged from None
    if 8 + num_bytes + max(ends, default=0) != size:
        raise damaged
    return raw, header


def _sample_spans(name: str, data_start: int, tensors: Mapping[str, Any]) -> list[Span]:
    """The middle of every tensor: a model tuned in some layers only differs there and nowhere else."""
    offsets = sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values())
    step = -(-len(offsets) // MAX_SAMPLES) or 1
    spans = []
    for start, stop in offsets[::step]:
        first = max(start, (start + stop - SAMPLE_BYTES) // 2)
        spans.append((name, data_start + first, data_start + min(stop, first + SAMPLE_BYTES)))
    return spans


def _contents(sizes: Mapping[str, int]) -> str:
    return f"It holds {_listed(sorted(sizes))}." if sizes else "It holds no files."


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
