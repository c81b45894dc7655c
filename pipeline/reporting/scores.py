"""Read the judges' scores of an evaluation: RUN/_scores/part-*.parquet, one file per data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.run import Run
from pipeline.storage.shard_files import as_damaged_file

SCORES = "_scores/"
KEYS = ("row_id", "variant", "sample")
Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class ScoreFile:
    """The scores of one data file's rows; empty where there are none.

    Args:
        place_by_key: the index of each row by (row id, variant, sample).
        scores: by judge, a vector over the rows.
    """

    place_by_key: Mapping[Key, int]
    scores: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]

    @classmethod
    def beside(cls, run: Run, file: str, judges: Sequence[str]) -> ScoreFile:
        """Read the score file of a data file.

        Args:
            run: the run.
            file: the data file.
            judges: columns to read; none for an empty result.
        """
        if not judges:
            return cls({}, {})
        name = f"{SCORES}{file}"
        with as_damaged_file(run.store.url(name)), run.store.open(name) as handle:
            table = pq.read_table(handle)
        keys = zip(*(_column(table, key) for key in KEYS), strict=True)
        scores = {
            judge: np.asarray(table.column(judge).cast(pa.float64()).to_numpy(), dtype=np.float64)
            for judge in judges
            if judge in table.column_names
        }
        return cls({key: at for at, key in enumerate(keys)}, scores)

    def take(self, keys: Sequence[Key]) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """The scores of these rows, by "scores.JUDGE"; NaN where a row was not judged."""
        if not self.scores:
            return {}
        places = np.array([self.place_by_key.get(key, -1) for key in keys], dtype=np.int64)
        found = places >= 0
        taken = {f"scores.{judge}": np.full(len(keys), np.nan) for judge in self.scores}
        for judge, values in self.scores.items():
            taken[f"scores.{judge}"][found] = values[places[found]]
        return taken


def find_judges(run: Run, files: Sequence[str]) -> tuple[str, ...]:
    """The judges that scored every data file, in the order of their columns; none where a score file is missing."""
    stored = set(run.store.names(f"{SCORES}part-"))
    if not files or not {f"{SCORES}{file}" for file in files} <= stored:
        return ()
    name = f"{SCORES}{files[0]}"
    with as_damaged_file(run.store.url(name)), run.store.open(name) as handle:
        schema = pq.read_schema(handle)
    return tuple(field.name for field in schema if pa.types.is_floating(field.type))


def _column(table: pa.Table, name: str) -> list[Any]:
    return list(table.column(name).to_pylist()) if name in table.column_names else [0] * table.num_rows
