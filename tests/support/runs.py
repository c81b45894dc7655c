"""Small runs of the main job in this process: prompts, a configuration, the files that come out."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.stages.relabel import relabel
from pipeline.storage.run import Run
from support.failpoints import Watcher, watched

PRINCIPALS = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}


def write_prompts(path: Path, num_rows: int = 11) -> Path:
    """Write prompts of several lengths, with ids r0, r1 and so on; the path."""
    rows = [{"id": f"r{at}", "prompt": "tell me " * (at % 4) + "x" * (at + 1)} for at in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(prompts: Path | str, output: Path | str, base: Path | str | Mapping[str, Any], **sections: Any) -> Config:
    """A job with two prompted principals and shards of three rows; `sections` add to its own or replace them."""
    decoding = {"max_new_tokens": 8, "agent_temperature": 0.5, "trace": "tokens"} | sections.pop("decoding", {})
    cluster = {"transport": "local", "slots": 4} | sections.pop("cluster", {})
    return parse_config(
        {
            "input": {"path": str(prompts), "id": "id"} | sections.pop("input", {}),
            "output": {"path": str(output), "rows_per_shard": 3},
            "base": dict(base) if isinstance(base, Mapping) else str(base),
            "principals": sections.pop("principals", PRINCIPALS),
            "decoding": decoding,
            "cluster": cluster,
            **sections,
        }
    )


def run_job(config: Config, tmp_path: Path, *, watch: Watcher | None = None, **options: Any) -> tuple[Run, bool]:
    """Bring a run to its end, reporting its failpoints to `watch`; the run, and whether there was anything to do."""
    return relabel(config, tmp_path / "cache", io.StringIO(), wiring=watched(watch), **options)


def parts(folder: Path) -> dict[str, bytes]:
    """The data files of a run by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}
