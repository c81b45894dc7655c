"""The names of a run's files.

Readers of Parquet folders skip names that begin with "_" or ".", so that they find the newest data files and nothing
else. A shard whose rows were mended has a data file of another name; the file before is moved to `_superseded/`.
"""

from __future__ import annotations

import re

from pipeline.storage.plan import Plan

PLAN, MANIFEST, CARD, SUCCESS = "_plan.json", "_manifest.json", "_README.md", "_SUCCESS"
LOADING_FILE = ".huggingface.yaml"  # `load_dataset(RUN)` reads it; without it, it would take failed rows for data
EARLIER_PLAN = "plan.json"  # of runs before 2026-11-25, which can be read and resumed
OWN_INPUT = "_input"  # a folder with the input of a run of failed rows, which is there before the run
COMMITS, FAILED, PAIRS, SCORES = "_commits/", "_failed/", "_pairs/", "_scores/"
EARLIER_FAILED = "_rejected/"  # of runs before 2026-11-25
REVISED, SUPERSEDED, RETRIES = "_revised/", "_superseded/", "_retries/"
COMMIT_NAME = re.compile(re.escape(COMMITS) + r"part-(\d+)(?:\.(\d+))?\.json")
SHARD_NUMBER = re.compile(r"part-(\d+)")


def part_name(plan: Plan, shard: int, revision: int = 0) -> str:
    """The beginning of the names of a shard's files: "part-00001-of-00042", of a revision "part-00001-of-00042.1".

    A shard keeps its number of shards when the run is extended.
    """
    num_shards = plan.num_shards_at(shard)
    width = max(5, len(str(num_shards)))
    name = f"part-{shard:0{width}d}-of-{num_shards:0{width}d}"
    return f"{name}.{revision}" if revision else name


def data_name(plan: Plan, shard: int, revision: int = 0) -> str:
    """A shard's data file."""
    return f"{part_name(plan, shard, revision)}.parquet"


def commit_name(plan: Plan, shard: int, revision: int = 0) -> str:
    """A shard's commit record."""
    number = part_name(plan, shard).partition("-of-")[0]
    return f"{COMMITS}{number}.{revision}.json" if revision else f"{COMMITS}{number}.json"


def shard_of(name: str) -> int:
    """The shard that a commit record or a file of rows belongs to; -1 where the name does not say."""
    found = SHARD_NUMBER.search(name)
    return -1 if found is None else int(found[1])


def is_of_failed_rows(name: str) -> bool:
    """Whether a file of a run holds its failed rows."""
    return name.startswith((FAILED, EARLIER_FAILED))
