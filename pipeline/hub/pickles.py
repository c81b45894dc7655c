"""Weights in pickled files (`.bin`) to safetensors, read by a process of its own that loads tensors alone.

A pickle can run code when it is read. torch.load with `weights_only` refuses everything but tensors and plain
containers; reading happens in another process all the same, so that nothing of it reaches this one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigurationError
from pipeline.hub.weight_files import ADAPTER_WEIGHTS, INDEX, VALUE_HEAD, WEIGHTS, LocalTree, read_json

if TYPE_CHECKING:
    from torch import Tensor

PICKLED_INDEX = "pytorch_model.bin.index.json"
TARGETS = {
    "pytorch_model.bin": WEIGHTS,
    "adapter_model.bin": ADAPTER_WEIGHTS,
    "value_head.bin": VALUE_HEAD,
}
PART = re.compile(r"pytorch_model-(\d+-of-\d+)\.bin")
WRAPPERS = ("state_dict", "model_state_dict", "module", "model")  # keys under which trainers put the weights


@dataclass(frozen=True, slots=True)
class Converted:
    """A file that was written.

    Args:
        source: name of the pickled file.
        target: name of the safetensors file.
        num_tensors: in it.
        num_bytes: of its tensors.
    """

    source: str
    target: str
    num_tensors: int
    num_bytes: int


def convert_folder(folder: Path) -> Iterator[Converted]:
    """Write the safetensors files of a folder's pickled weights beside these, one after another.

    Files that are there already stay as they are. A file is written under another name first, so that one with its
    name is always whole.

    Raises:
        ConfigurationError: the folder has no pickled weights, or one holds anything but tensors.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"there is no folder {folder}")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    targets = {name: target for name in names if (target := target_of(name)) is not None}
    if not targets:
        others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        hint = f"; {', '.join(others[:5])} have other names" if others else ""
        raise ConfigurationError(
            f"{folder} has no pickled weights: {', '.join(TARGETS)} or the parts that {PICKLED_INDEX} names{hint}"
        )
    todo = {name: target for name, target in targets.items() if not (folder / target).exists()}
    if todo:
        yield from _convert(folder, todo)
    if PICKLED_INDEX in names and not (folder / INDEX).exists():
        _write_index(folder)


def target_of(name: str) -> str | None:
    """The safetensors file that a pickled one becomes; None for files that are no weights, as training_args.bin."""
    part = PART.fullmatch(name)
    return f"model-{part[1]}.safetensors" if part else TARGETS.get(name)


def _convert(folder: Path, targets: Mapping[str, str]) -> Iterator[Converted]:
    """Have another process convert files. Raises ConfigurationError with what it says is wrong with one."""
    command = [sys.executable, "-m", "pipeline.hub.pickles", str(folder), json.dumps(dict(targets))]
    left = list(targets)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            result: Mapping[str, Any] = json.loads(line)
            name = left.pop(0)
            if "error" in result:
                raise ConfigurationError(f"{folder / name} cannot be converted: {result['error']}")
            yield Converted(name, targets[name], result["num_tensors"], result["num_bytes"])
        code = process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if left:
        reason = said[-1][:300] if said else f"exit code {code}"
        raise ConfigurationError(f"{folder / left[0]} cannot be converted: the process that reads it ended: {reason}")


def _write_index(folder: Path) -> None:
    """The index of the converted parts."""
    index = read_json(LocalTree(folder), PICKLED_INDEX)
    weight_map = {name: target_of(str(part)) for name, part in dict(index.get("weight_map") or {}).items()}
    if not weight_map or None in weight_map.values():
        raise ConfigurationError(f"{folder / PICKLED_INDEX} names no parts that can be converted")
    temporary = folder / f".{INDEX}.tmp"
    temporary.write_text(json.dumps({**index, "weight_map": weight_map}, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / INDEX)


def read_tensors(source: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, by name. Runs no code of the file.

    Raises:
        ValueError: it holds anything but tensors.
    """
    import pickle

    import torch

    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        text = str(error)
        named = re.search(r"GLOBAL ([\w.]+)", text)
        if named:
            raise ValueError(f"it holds {named[1]}, which is no tensor and could run code") from None
        raise ValueError(f"it is no file of tensors ({' '.join(text.split())[:160]})") from None
    while isinstance(found, dict) and len(found) == 1 and (key := next(iter(found))) in WRAPPERS:
        found = found[key]
    if not isinstance(found, dict) or not found:
        raise ValueError("it holds no weights by name")
    others = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"it holds {len(others)} entries that are no tensors, such as {others[0]}")
    # weights that share memory, as tied ones do, are written one by one
    return {str(name): value.detach().clone().contiguous() for name, value in found.items()}


def _convert_one(source: Path, target: Path) -> dict[str, Any]:
    """Convert one file and compare what was written with what was read."""
    import torch
    from safetensors.torch import load_file, save_file

    try:
        tensors = read_tensors(source)
    except ValueError as error:
        return {"error": str(error)}
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {"format": "pt"})
        written = load_file(temporary)
        same = (torch.equal(_as_bytes(written[name]), _as_bytes(tensors[name])) for name in tensors)
        if written.keys() != tensors.keys() or not all(same):
            return {"error": "what was written is not what was read"}
        temporary.replace(target)
    except OSError as error:
        return {"error": f"{target.name} cannot be written: {error}"}
    finally:
        temporary.unlink(missing_ok=True)
    return {"num_tensors": len(tensors), "num_bytes": sum(each.nbytes for each in tensors.values())}


def _as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaN is not equal to itself."""
    import torch

    return tensor.flatten().view(torch.uint8)


if __name__ == "__main__":
    for source_name, target_name in json.loads(sys.argv[2]).items():
        here = Path(sys.argv[1])
        print(json.dumps(_convert_one(here / source_name, here / target_name)), flush=True)
