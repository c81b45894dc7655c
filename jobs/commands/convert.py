"""`cage convert`: pickled weights of a folder to safetensors."""

from __future__ import annotations

from pathlib import Path

from pipeline.hub.pickles import convert_folder
from pipeline.quoting import size


def run_convert(folder: Path) -> None:
    found = []
    for each in convert_folder(folder):
        found.append(each)
        count = f"{each.num_tensors:,} tensor{'s' * (each.num_tensors != 1)}"
        print(f"{each.source} -> {each.target}: {count}, {size(each.num_bytes)}", flush=True)
    if not found:
        print(f"{folder} has its weights as safetensors already")
