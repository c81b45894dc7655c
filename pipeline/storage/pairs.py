"""Pairs for preference training: what DPOTrainer and its kin read, without rows that have no pair."""

from __future__ import annotations

import pyarrow as pa

from pipeline.records import is_reserved
from pipeline.storage.tables import write_table_bytes

COLUMNS = (
    "row_id",
    "sample",
    "variant",
    "rule",
    "agent_temperature",
    "game_unit",
    "draw_temperature",
    "prompt",
    "chosen",
    "rejected",
    "tools",
    "weights",
    "rewards",
    "original_rewards",
)


def has_pairs(names: list[str]) -> bool:
    """Whether data files with these columns have pairs."""
    return "chosen" in names


def pairs_bytes(answers: pa.Table) -> bytes:
    """A Parquet file with the rows of a data file that have both `chosen` and `rejected`.

    A function of the data file: whoever writes it, the bytes are the same.
    """
    there = answers.schema.names
    names = [*(name for name in COLUMNS if name in there), *(name for name in there if not is_reserved(name))]
    # Not Table.filter: it would load pyarrow.compute and pandas, which takes longer than the writing.
    whole = [
        chosen.is_valid and rejected.is_valid
        for chosen, rejected in zip(answers.column("chosen"), answers.column("rejected"), strict=True)
    ]
    slices = [answers.slice(at, 1) for at, is_whole in enumerate(whole) if is_whole]
    table = pa.concat_tables([answers.slice(0, 0), *slices]).select(names)
    return write_table_bytes(table)
