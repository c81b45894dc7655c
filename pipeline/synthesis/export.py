"""A data set as folders of `datasets.save_to_disk`: FOLDER/sft and FOLDER/preferences, each with its splits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.synthesis.dataset import CARD, Dataset
from pipeline.synthesis.files import FOLDER

MARKER = "cage_export.json"


def check_folder(folder: Path) -> None:
    """Raise ConfigurationError when the folder holds files that are not an export."""
    if folder.exists() and _digest_of(folder) is None and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigurationError(f"--export {folder} holds other files; name a new or empty folder")


def export(dataset: Dataset, folder: Path) -> bool:
    """Write the data set below `folder`, unless it is there; returns whether anything was written.

    It is written to a hidden folder beside it and then renamed, so that an interrupted export leaves no half data
    set.

    Raises:
        ConfigurationError: the folder holds other files, or the export of another data set.
    """
    check_folder(folder)
    standing = _digest_of(folder)
    if standing is not None:
        if standing == dataset.manifest["digest"]:
            return False
        raise ConfigurationError(f"--export {folder} holds the export of another data set; remove it or name another")
    aside = folder.absolute().with_name(f".{folder.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with TemporaryDirectory(prefix="cage-export-") as copies:
        for kind, splits in _parquet_files(dataset, Path(copies)).items():
            _save(splits, aside / kind, cache_folder=Path(copies) / "cache")
    (aside / "README.md").write_bytes(dataset.run.store.read(CARD) or b"")
    (aside / MARKER).write_text(json.dumps({"digest": dataset.manifest["digest"]}) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    aside.replace(folder)
    return True


def _digest_of(folder: Path) -> str | None:
    """The digest of the data set that was exported here; None where none was."""
    try:
        return str(json.loads((folder / MARKER).read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parquet_files(dataset: Dataset, copies: Path) -> dict[str, dict[str, list[str]]]:
    """Local copies of the data files by kind and split: the data set may be in an object store."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in dataset.manifest["files"]:
        kind, _, name = file["name"].partition("/")
        if name:
            copy = copies / file["name"]
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(dataset.run.store.read(FOLDER + file["name"]) or b"")
            found.setdefault(kind, {}).setdefault(name.partition("-")[0], []).append(str(copy))
    return found


def _save(splits: dict[str, list[str]], folder: Path, *, cache_folder: Path) -> None:
    import datasets  # seconds

    read: Any = datasets.Dataset.from_parquet
    loaded = {split: read(files, cache_dir=str(cache_folder)) for split, files in splits.items()}
    datasets.DatasetDict(loaded).save_to_disk(str(folder))
