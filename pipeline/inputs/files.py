"""Files of an input: their formats, what a plan keeps of them, and how they are opened."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from pipeline.errors import ConfigurationError, StorageError
from pipeline.inputs.rows import InputColumns
from pipeline.quoting import one_line
from pipeline.stores.addresses import as_storage_error, file_system, split_address
from pipeline.stores.retries import may_pass

DATASET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
READ_AHEAD_BYTES = 4 * 2**20


class Format(StrEnum):
    PARQUET = "parquet"
    JSONL = "jsonl"
    BATCH = "batch"  # OpenAI batch requests: custom_id, body.messages
    JSON = "json"  # an array of objects
    CSV = "csv"
    TSV = "tsv"
    ARROW = "arrow"  # Arrow's file or stream format; Feather is the former
    DATASET = "dataset"

    @property
    def is_text(self) -> bool:
        """Whether it is read by `jsonl`; else by `tabular`."""
        return self not in (Format.PARQUET, Format.ARROW, Format.DATASET)


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
        marks: for text, the rows where reading can begin, from row 0 on: (row, byte offset, lines or elements before
            it). Offsets count the bytes of the plain UTF-8 text.
        subset: of a data set.
        split: of a data set.
        layers: the compression and the encoding around the text of a file.
        header: the columns of a CSV or TSV file, in order.
        kept: of a data set, the columns that are carried into the output: their content counts for its identity.
    """

    path: str
    name: str
    format: Format
    columns: InputColumns
    num_rows: int
    identity: str
    marks: tuple[tuple[int, int, int], ...] = ()
    subset: str | None = None
    split: str | None = None
    layers: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


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
