"""Row ids of an input: every row has one, and none is there twice."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from pipeline.errors import ConfigurationError
from pipeline.storage import jsonl, tabular
from pipeline.storage.input_files import Format, InputFile
from pipeline.storage.quoting import quote

SHOWN = 5  # ids or places named in a message


def check_ids(files: Sequence[InputFile]) -> None:
    """Refuse missing and repeated ids.

    An input may have many millions of rows, so only a hash of 8 bytes per row is kept. Ids whose hashes repeat are
    counted exactly in a second pass, because two ids may have the same hash.

    Raises:
        ConfigurationError: it names the first ids or places.
    """
    if all(file.columns.id is None for file in files):
        return  # ids are file name and row number
    hashes, missing, num_missing = array("q"), [], 0
    for row_id, place in _read_all(files):
        if row_id is None:
            num_missing += 1
            missing += [place] if num_missing <= SHOWN else []
        else:
            hashes.append(hash(row_id))
    if num_missing:
        more = ", ..." if num_missing > len(missing) else ""
        raise ConfigurationError(
            f"{num_missing} rows have no usable id (text or a whole number): {', '.join(missing)}{more}"
        )
    ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if suspects:
        counts = Counter(row_id for row_id, _ in _read_all(files) if hash(row_id) in suspects)
        _refuse_repeated({str(row_id): count for row_id, count in counts.items() if count > 1})


def _refuse_repeated(count_by_id: dict[str, int]) -> None:
    if not count_by_id:
        return
    shown = ", ".join(f"{quote(row_id)} ({count} times)" for row_id, count in list(count_by_id.items())[:SHOWN])
    more = ", ..." if len(count_by_id) > SHOWN else ""
    raise ConfigurationError(f"row ids must be unique; {len(count_by_id)} repeat: {shown}{more}")


def _read_all(files: Sequence[InputFile]) -> Iterator[tuple[str | None, str]]:
    return chain.from_iterable(_read_ids(file) for file in files)


def _read_ids(file: InputFile) -> Iterator[tuple[str | None, str]]:
    if file.columns.id is None:
        return ((f"{file.name}:{row}", "") for row in range(file.num_rows))
    read = tabular.read_ids if file.format in (Format.PARQUET, Format.DATASET) else jsonl.read_ids
    return read(file)
