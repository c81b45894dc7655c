"""Records as they are: every row of files or a data set as its values by column, with its place for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.inputs import jsonl, tabular
from pipeline.inputs.files import Format, FoundFile, InputFile, is_dataset_name
from pipeline.inputs.listing import find_dataset, find_files
from pipeline.inputs.rows import InputColumns
from pipeline.quoting import quote

STRIDE = 1024


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One row.

    Args:
        file: the file's name.
        place: names the row in messages.
        values: by column; None of a row that cannot be read.
    """

    file: str
    place: str
    values: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class RecordFiles:
    """Rows of files of any format, or of one split of a data set.

    Args:
        files: in order of name.
        column_names: every column that some file has.
    """

    files: tuple[InputFile, ...]
    column_names: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows that are used, over all files."""
        return sum(file.num_rows for file in self.files)

    def read(self, names: Sequence[str]) -> Iterator[RawRecord]:
        """Yield every row in order with its values of the columns `names`, those of them that its file has."""
        for file in self.files:
            if file.format.is_text:
                values = jsonl.read_values(file, 0, file.num_rows)
            else:
                values = tabular.read_values(file, names, 0, file.num_rows)
            for number, record in enumerate(values, start=1):
                place = f"row {number} of {file.name}"
                yield RawRecord(file.name, place, record if record or not file.format.is_text else None)


def open_records(path: str, *, split: str = "train", subset: str | None = None, limit: int | None) -> RecordFiles:
    """Find files, or a data set by its name, and count and hash their rows.

    Args:
        path: a file, a folder, a pattern, an address in an object store, or a `datasets` name.
        split, subset: of a data set.
        limit: first rows only, over all files.

    Raises:
        ConfigurationError: there is no such input, or it holds no rows.
    """
    dataset = find_dataset(path, split=split, subset=subset)
    found = None if dataset is not None else find_files(path, split=split)
    columns: dict[str, None] = {}
    files: list[InputFile] = []
    if found is None:
        files.append(_open_dataset(dataset or path, split, subset, limit, columns))
    else:
        left = limit
        for each in found.files:
            if left == 0:
                break
            files.append(_open_file(each, left, columns))
            left = None if left is None else left - files[-1].num_rows
    files = [file for file in files if file.num_rows]
    if not files:
        raise ConfigurationError(f"input.path: {path} holds no rows")
    return RecordFiles(tuple(files), tuple(columns))


def _open_file(found: FoundFile, limit: int | None, columns: dict[str, None]) -> InputFile:
    if found.format.is_text:
        text, keys = jsonl.peek(found)
        columns.update(dict.fromkeys(keys))
        scan = jsonl.scan(text, found.name, stride=STRIDE, limit=limit)
        file = InputFile(
            found.path, found.name, text.format, InputColumns(), scan.num_rows, scan.identity, scan.marks,
            layers=text.layers, header=text.header,
        )  # fmt: skip
        if not text.header:  # a later line may have keys that the first ones lack
            for record in jsonl.read_values(file, 0, file.num_rows):
                columns.update(dict.fromkeys(record))
        return file
    schema, num_rows = tabular.read_schema(found)
    columns.update(dict.fromkeys(schema.names))
    num_rows = num_rows if limit is None else min(num_rows, limit)
    identity = tabular.content_identity(found)
    return InputFile(found.path, found.name, found.format, InputColumns(), num_rows, identity)


def _open_dataset(
    path: str, split: str, subset: str | None, limit: int | None, columns: dict[str, None]
) -> InputFile:
    if not is_dataset_name(path) and not Path(path).is_dir():
        raise ConfigurationError(f"input.path: there is no file or folder {quote(path)}")
    dataset = tabular.load_dataset(path, subset, split)
    columns.update(dict.fromkeys(dataset.column_names))
    name = ":".join(part for part in (path, subset, split) if part)
    num_rows = len(dataset) if limit is None else min(len(dataset), limit)
    # the library's fingerprint changes with the data and with whatever was done to it
    identity = f"datasets:{dataset._fingerprint}"
    return InputFile(path, name, Format.DATASET, InputColumns(), num_rows, identity, subset=subset, split=split)
