"""Decode rows with a configuration given as a plain tree, in this process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.engine.engine import Engine, decode_rows
from pipeline.records import Record, Row
from pipeline.runtime.assembly import Assembly, assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_hosts

NOWHERE = Path("/nonexistent-cache")


def config_of(
    base: Path | str | Mapping[str, Any], principals: Mapping[str, Any] | None = None, **sections: Any
) -> Config:
    return parse_config(
        {
            "input": {"path": "unused.jsonl"},
            "output": {"path": "unused"},
            "base": dict(base) if isinstance(base, Mapping) else str(base),
            "principals": dict(principals or {}),
            **sections,
        }
    )


def engine_of(config: Config, cache_folder: Path = NOWHERE) -> tuple[Engine, Assembly]:
    assembly = assemble(config, cache_folder)
    return make_engine(assembly, start_hosts(assembly)), assembly


def decode(config: Config, rows: Iterable[Row], cache_folder: Path = NOWHERE) -> dict[str, Record]:
    """Records by row id; by "id/sample" where there are several samples."""
    engine, _ = engine_of(config, cache_folder)
    records = decode_rows(engine, rows, num_samples=config.decoding.n)
    many = config.decoding.n > 1
    return {f"{r.row_id}/{r.sample}" if many else r.row_id: r for r in records}


def ask(row_id: str, text: str, **fields: Any) -> Row:
    return Row(row_id, ({"role": "user", "content": text},), **fields)
