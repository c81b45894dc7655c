"""Row ids of an input: every row gets one, and no two rows the same."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NoReturn

import numpy as np

from pipeline.errors import ConfigurationError
from pipeline.inputs import jsonl, tabular
from pipeline.inputs.files import InputFile
from pipeline.inputs.rows import ID_ADVICE, FoundId
from pipeline.quoting import quote

SHOWN = 5  # ids or places named in a message
MOST_REPEATED = 1000  # ids that may repeat; they are kept in the plan


def find_repeated_ids(files: Sequence[InputFile]) -> frozenset[str]:
    """The ids that more than one row has; rows that fail for their id, and rows without one, are named by position.

    An input may have many millions of rows, so only a hash of 8 bytes per row is kept. Ids whose hashes repeat are
    counted exactly in a second pass, because two ids may have the same hash. The positions that name failing rows
    must not be the ids of others either: a row with one of them as its id fails too, which may take a few passes.

    Raises:
        ConfigurationError: most rows have no usable id, or very many ids repeat: the column is not one of ids.
    """
    if all(file.columns.id is None for file in files):
        return frozenset()  # ids are file name and row number
    hashes, missing, num_missing = array("q"), [], 0
    for found in _read_all(files):
        hashes.append(hash(found.row_id or found.position))
        if found.row_id is None and not found.is_broken:
            num_missing += 1
            missing += [found.place] if num_missing <= SHOWN else []
    if num_missing > len(hashes) / 2:
        more = ", ..." if num_missing > len(missing) else ""
        raise ConfigurationError(
            f"{num_missing} of {len(hashes)} rows have no usable id (text or a whole number) in the column "
            f"{_column(files)}: {', '.join(missing)}{more}; {ID_ADVICE}"
        )
    ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
    return _count_repeated(files, set(ordered[1:][ordered[1:] == ordered[:-1]].tolist()))


def _count_repeated(files: Sequence[InputFile], suspects: set[int]) -> frozenset[str]:
    """The ids among those of the hashes `suspects` that repeat."""
    repeated: set[str] = set()
    while suspects:
        counts: Counter[str] = Counter()
        for found in _read_all(files):
            name = found.position if found.row_id is None or found.row_id in repeated else found.row_id
            if hash(name) in suspects:
                counts[name] += 1
        new = {name for name, count in counts.items() if count > 1} - repeated
        if not new:
            break
        repeated |= new
        if len(repeated) > MOST_REPEATED:
            _refuse({name: counts[name] for name in counts if name in new}, len(repeated), files)
        suspects |= {hash(found.position) for found in _read_all(files) if found.row_id in new}
    return frozenset(repeated)


def _refuse(count_by_id: dict[str, int], num_repeated: int, files: Sequence[InputFile]) -> NoReturn:
    shown = ", ".join(f"{quote(row_id)} ({count} times)" for row_id, count in list(count_by_id.items())[:SHOWN])
    raise ConfigurationError(
        f"row ids must be unique; {num_repeated} repeat in the column {_column(files)}: {shown}, ...; {ID_ADVICE}"
    )


def _column(files: Sequence[InputFile]) -> str:
    return next(quote(file.columns.id) for file in files if file.columns.id is not None)


def _read_all(files: Sequence[InputFile]) -> Iterator[FoundId]:
    return chain.from_iterable(_read_ids(file) for file in files)


def _read_ids(file: InputFile) -> Iterator[FoundId]:
    if file.columns.id is None:
        return (FoundId(f"{file.name}:{row}", f"{file.name}:{row}", "") for row in range(file.num_rows))
    read = jsonl.read_ids if file.format.is_text else tabular.read_ids
    return read(file)
