"""Which files make up an input: a path becomes a list of files with their formats."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from pipeline.errors import ConfigurationError, StorageError
from pipeline.storage.addresses import as_storage_error, file_system, split_address
from pipeline.storage.quoting import one_line, quote
from pipeline.storage.retries import may_pass
from pipeline.storage.rows import InputColumns

FORMAT_BY_SUFFIX = {".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
READ_AHEAD_BYTES = 4 * 2**20


class Format(StrEnum):
    PARQUET = "parquet"
    JSONL = "jsonl"
    BATCH = "batch"  # OpenAI batch requests: custom_id, body.messages
    DATASET = "dataset"


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of the input, or one split of a data set.

    Args:
        path: opens it: an absolute path, a URL, or the data set's name.
        name: what row ids and messages call it.
        format: how it is read.
        columns: which columns are read.
        num_rows: how many rows are used, from the first one.
        identity: changes when the content of these rows does.
        marks: for JSONL, (byte offset, lines before) of rows 0, stride, 2 * stride, ..., where reading can begin.
        subset: of a data set.
        split: of a data set.
    """

    path: str
    name: str
    format: Format
    columns: InputColumns
    num_rows: int
    identity: str
    marks: tuple[tuple[int, int], ...] = ()
    subset: str | None = None
    split: str | None = None


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that was listed and not read yet.

    Args:
        path: opens it.
        name: its last part.
        format: by its suffix.
        size: in bytes.
        tag: the object store's tag of its content; None for a local file.
    """

    path: str
    name: str
    format: Format
    size: int
    tag: str | None = None


def find_files(path: str) -> list[FoundFile] | None:
    """List the input files under `path` in order of name; None when there is no such path.

    A folder is not searched below its first level; names that begin with `.` or `_`, and files of other kinds,
    are left out.

    Raises:
        ConfigurationError: a file of another kind, or a folder without any input file.
    """
    scheme, address = split_address(path)
    try:
        found = _list_local(Path(address)) if scheme is None else _list_objects(scheme, address)
    except (StorageError, OSError) as error:
        raise ConfigurationError(f"input.path: {error}") from None
    if found is None:
        return None
    is_file, entries = found
    if is_file and not (entries and _format(entries[0][0])):
        raise ConfigurationError(f"input.path: {path} must end in {', '.join(FORMAT_BY_SUFFIX)}")
    _refuse_unfinished_run(path, {entry[0] for entry in entries})
    files = [_found(*entry) for entry in sorted(entries) if is_file or _is_input(entry[0])]
    if not files:
        raise ConfigurationError(f"input.path: no Parquet or JSONL file in the folder {path}")
    return files


def open_bytes(path: str) -> BinaryIO:
    """Open a local file or an object for reading at any position. Raises StorageError."""
    scheme, address = split_address(path)
    with as_storage_error(f"read {path}"):
        try:
            if scheme is None:
                return Path(address).open("rb", buffering=READ_AHEAD_BYTES // 4)
            handle = file_system(scheme).open(address, "rb", block_size=READ_AHEAD_BYTES)
            return cast(BinaryIO, io.BufferedReader(handle))  # fsspec's own readline has no limit
        except FileNotFoundError:
            raise StorageError(f"{path} does not exist any more") from None


@contextlib.contextmanager
def as_input_error(name: str) -> Iterator[None]:
    """Raise a failure to read an input file as one line that names the file.

    Raises:
        StorageError: the failure may be temporary (`may_pass`), so the input itself may be good.
        ConfigurationError: the input is not usable.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except (StorageError, OSError, ValueError, ArithmeticError, LookupError, TypeError, pa.ArrowException) as error:
        kind = StorageError if may_pass(error) else ConfigurationError
        raise kind(f"{name} cannot be read: {one_line(error)}") from error


def is_dataset_name(path: str) -> bool:
    """Whether `path` could be a `datasets` name: `name` or `owner/name`, without a file's suffix."""
    return bool(DATASET_NAME.fullmatch(path)) and not re.search(r"\.[A-Za-z]\w*$", path)


def _found(name: str, path: str, size: int, tag: str | None) -> FoundFile:
    if not name.isprintable():  # it becomes part of row ids and messages
        raise ConfigurationError(f"the file name {quote(name)} has characters that cannot be shown; rename the file")
    kind = _format(name)
    assert kind is not None
    return FoundFile(path=path, name=name, format=kind, size=size, tag=tag)


def _format(name: str) -> Format | None:
    kind = FORMAT_BY_SUFFIX.get(Path(name).suffix.lower())
    return Format(kind) if kind else None


def _is_input(name: str) -> bool:
    return not name.startswith((".", "_")) and _format(name) is not None


def _refuse_unfinished_run(path: str, names: set[str]) -> None:
    if names & {"_plan.json", "plan.json"} and "_SUCCESS" not in names and any(name.startswith("part-") for name in names):
        raise ConfigurationError(f"input.path: {path} is a run that is not finished; finish it first")


Entry = tuple[str, str, int, str | None]  # name, path, size, tag


def _list_local(path: Path) -> tuple[bool, list[Entry]] | None:
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links, whose names users know
    if path.is_file():
        return True, [(path.name, str(path), path.stat().st_size, None)]
    if not path.is_dir():
        return None
    with os.scandir(path) as entries:
        return False, [(e.name, e.path, e.stat().st_size, None) for e in entries if e.is_file()]


def _list_objects(scheme: str, address: str) -> tuple[bool, list[Entry]] | None:
    files = file_system(scheme)
    with as_storage_error(f"list {scheme}://{address}"):
        try:
            info = files.info(address)
            is_file = info["type"] == "file"
            listing = [info] if is_file else files.ls(address, detail=True)
        except FileNotFoundError:
            return None
    entries: list[Entry] = []
    for entry in listing:
        key = str(entry["name"]).strip("/")
        tag = entry.get("ETag") or entry.get("etag") or entry.get("md5Hash")
        if entry["type"] == "file" and not str(entry["name"]).endswith("/"):
            entries.append((key.rpartition("/")[2], f"{scheme}://{key}", int(entry["size"]), tag))
    return is_file, entries
