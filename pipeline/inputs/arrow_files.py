"""Arrow files: the file format (Feather is that), and the stream format, which `datasets` writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.inputs.files import open_bytes
from pipeline.stores.addresses import split_address

FILE_MARK, FEATHER_1_MARK = b"ARROW1", b"FEA1"


def read_schema(path: str) -> tuple[pa.Schema, int]:
    """The schema and the number of rows.

    Raises:
        ValueError: it is of Feather's first version.
    """
    with _opened(path, None) as (schema, batches):
        return schema, sum(batch.num_rows for batch in batches)


def read_batches(path: str, names: Sequence[str], start: int, stop: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows [start, stop) of the columns `names`, at most `batch_rows` at once."""
    with _opened(path, names) as (_, batches):
        first = 0
        for batch in batches:
            low, high = max(start - first, 0), min(stop - first, batch.num_rows)
            for begin in range(low, high, batch_rows):
                yield batch.slice(begin, min(batch_rows, high - begin))
            first += batch.num_rows
            if first >= stop:
                return


@contextlib.contextmanager
def _opened(path: str, names: Sequence[str] | None) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema and the record batches, with the columns `names` only, or none of them: then the rows count."""
    with _source(path) as source:
        start = source.read(len(FILE_MARK))
        if start.startswith(FEATHER_1_MARK):
            raise ValueError("it has Feather's first version; write it again with pyarrow or pandas")
        source.seek(0)
        open_one: Any = pa.ipc.open_file if start == FILE_MARK else pa.ipc.open_stream
        schema = open_one(source).schema
        # One column is the least that can be asked for: an empty list means all.
        wanted = [schema.get_field_index(name) for name in names] if names else [0][: len(schema)]
        source.seek(0)
        reader = open_one(source, options=pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False))
        is_file = start == FILE_MARK
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        yield schema, batches


def _source(path: str) -> Any:
    """A file whose parts are read when they are used: mapped into memory, or an object."""
    scheme, address = split_address(path)
    return pa.memory_map(address) if scheme is None else pa.PythonFile(open_bytes(path), mode="r")
