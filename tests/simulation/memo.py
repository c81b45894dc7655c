"""The job of every schedule, and pure functions whose results are kept: what takes long and depends on nothing else.

A plan, the Parquet bytes of a table, the table in some bytes, the card: the real functions compute each once in the
life of the process. What a schedule is about, the order of writes and what is read back, is done anew every time.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import tenacity

from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.config.variants import lay_out
from pipeline.monitoring import reasons
from pipeline.protocol.specs import Drafts, GameSpec, HostSpec
from pipeline.records import Record, Row
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.topology import build_topology
from pipeline.stages.relabel import Prepared
from pipeline.storage import card, shard_files, tables
from pipeline.storage.commits import CommitRecord
from pipeline.storage.plan import Plan, Shard, make_plan, open_planned_input
from pipeline.stores import addresses
from simulation.hosts import POISON, VOCAB, TablePrompter

ROWS = ("one", "two and", POISON, None, "four", "and five")  # the one without a prompt fails
ROWS_PER_SHARD = 2
NUM_TOKENS = 3
FAILED_ROW = "r3"
STALL_S, STEP_S, START_S = 25.0, 6.0, 20.0
ADDRESSES = {"disk": "/mnt/data/runs/run", "s3": "s3://bucket/runs/run"}


@functools.cache
def input_file() -> Path:
    """The input of every schedule, a real file."""
    folder = Path(tempfile.mkdtemp(prefix="simulation-"))
    rows = [{"id": f"r{at}", "prompt": prompt} for at, prompt in enumerate(ROWS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "prompts.jsonl"


@functools.cache
def make_config(
    store: str, topology: str, transport: str, slots: int, replicas: int, budget: int, has_drafts: bool
) -> Config:
    """The configuration of a command."""
    principals: dict[str, Any] = {"kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7}}
    if topology == "pair":
        principals["arm"] = {"kind": "arm", "model": "other-table", "reference": "none", "weight": 0.3}
    return parse_config(
        {
            "input": {"path": str(input_file()), "id": "id"},
            "output": {"path": ADDRESSES[store], "rows_per_shard": ROWS_PER_SHARD},
            "base": "table",
            "principals": principals,
            "decoding": {"max_new_tokens": NUM_TOKENS, "candidates": 4, "agent_temperature": 0.5}
            | ({"draft": ["model", "lookup"], "draft_model": "small-table"} if has_drafts else {"draft": "off"}),
            "cluster": {
                "transport": transport,
                "slots": slots,
                "replicas": replicas,
                "stall_timeout_s": STALL_S,
                "step_timeout_s": STEP_S,
                "start_timeout_s": START_S,
            },
            "errors": {"budget": budget, "max_attempts": 3, "max_host_failures": 6},
        }
    )


_by_id: dict[tuple[Any, ...], Any] = {}


def _kept(function: Callable[..., Any], config: Config) -> Any:
    """The result of a function of a configuration that `make_config` keeps."""
    key = (function, id(config))
    if key not in _by_id:
        _by_id[key] = config, function(config)
    return _by_id[key][1]


def prepare(config: Config, cache_folder: Path, progress: Any = None, *, source: Any = None) -> Prepared:
    """In place of `pipeline.stages.relabel.prepare`: models are tables, and are not looked for."""
    prepared: Prepared = _kept(_prepare, config)
    return prepared


def _prepare(config: Config) -> Prepared:
    models: Any = None
    source = _once(("input", *config.principals), lambda: open_planned_input(config))
    return Prepared(models, make_plan(config, {"base": "table@1"}, source=source))


def plan_replica(config: Config, models: Any, cache_folder: Path, *, now: Any = None) -> Any:
    """In place of `pipeline.runtime.replica_plan.plan_replica`."""
    return SimpleNamespace(
        config=config,
        reasoning=None,
        template_time=None,
        foreign_adapters=[],
        hosts=[SimpleNamespace(cache_folder=cache_folder)],
    )


def load_assembly(replica: Any) -> Assembly:
    """In place of `pipeline.runtime.assembly.load_assembly`."""
    assembly: Assembly = _kept(_assemble, replica.config)
    return assembly


def _assemble(config: Config) -> Assembly:
    topology = build_topology(config)
    source: Any = SimpleNamespace(name="table", num_parameters_by_dtype={})
    variants = lay_out(config)
    games = GameSpec(config.decoding.sampling, topology.principals, frozenset(each.rule for each in variants))
    hosts = tuple(
        HostSpec(
            each.name,
            each.serves,
            source,
            "float32",
            "cpu",
            each.roles,
            config.cluster.first_slots,
            VOCAB,
            True,
            Path("nowhere"),
            games=games if len(topology.hosts) == 1 else None,
            drafts=Drafts.NOWHERE if config.decoding.draft == "off" else Drafts.ANYWHERE,
        )
        for each in topology.hosts
    )
    prompter, draft = TablePrompter(topology.roles), hosts[0] if config.decoding.draft_model else None
    return Assembly(config, topology, hosts, {"base": "table@1"}, prompter, variants, draft=draft)


# pure functions of storage

_tables: dict[Any, Any] = {}


def _once(key: Any, compute: Callable[[], Any]) -> Any:
    if key not in _tables:
        _tables[key] = compute()
    return _tables[key]


@functools.cache
def _schema(
    names: tuple[str, ...], options: tuple[tuple[str, Any], ...], metadata: tuple[tuple[str, str], ...]
) -> Any:
    return tables.output_schema(names, **dict(options), metadata=dict(metadata))


def output_schema(principal_names: Sequence[str], *, metadata: Mapping[str, str], **options: Any) -> pa.Schema:
    return _schema(tuple(principal_names), tuple(options.items()), tuple(metadata.items()))


def failed_schema(schema: pa.Schema) -> pa.Schema:
    return _once(("failed schema", id(schema)), lambda: (schema, tables.failed_schema(schema)))[1]


def to_table(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    key = ("table", id(schema), repr(records))
    return _once(key, lambda: (schema, tables.to_table(records, schema)))[1]


def write_table_bytes(table: pa.Table, *, metadata: Mapping[str, str] | None = None) -> bytes:
    key = ("bytes", id(table), tuple((metadata or {}).items()))
    data: bytes = _once(key, lambda: (table, tables.write_table_bytes(table, metadata=metadata)))[1]
    return data


_read_table = shard_files.read_table
_read_shard = Plan.read_shard


def read_table(data: bytes, source: str) -> pa.Table:
    return _once(("read", data), lambda: _read_table(data, source))


def read_shard(self: Plan, shard: Shard | int) -> Iterator[Row]:
    shard = self.shards[shard] if isinstance(shard, int) else shard
    return iter(_once(("rows", self.files[0].path, shard), lambda: list(_read_shard(self, shard))))


_count_tokens, _unsteered = shard_files.count_tokens, shard_files._unsteered


def count_tokens(table: pa.Table) -> int:
    count: int = _once(("tokens", id(table)), lambda: (table, _count_tokens(table)))[1]
    return count


def unsteered(table: pa.Table) -> int:
    count: int = _once(("unsteered", id(table)), lambda: (table, _unsteered(table)))[1]
    return count


kind_of = functools.lru_cache(maxsize=1024)(reasons.kind_of)
check_name = functools.lru_cache(maxsize=1024)(addresses.check_name)
record_from_json = functools.lru_cache(maxsize=64)(CommitRecord.from_json)

_digest = Plan.digest.fget
_from_json = Plan.from_json
_to_json = Plan.to_json


def digest(self: Plan) -> str:
    text: str = _once(("digest", id(self.fingerprint)), lambda: (self.fingerprint, _digest(self)))[1]
    return text


def plan_from_json(data: bytes, *, source: str = "") -> Plan:
    plan: Plan = _once(("plan", data), lambda: _from_json(data, source=source))
    return plan


def plan_to_json(self: Plan) -> bytes:
    return bytes(_once(("json", id(self)), lambda: (self, _to_json(self)))[1])


wait_chain, wait_random = functools.cache(tenacity.wait_chain), functools.cache(tenacity.wait_random)


def render_card(plan: Plan, records: Any, errors: Any) -> bytes:
    sums = [(each.rows, each.failed, each.tokens) for _, each in sorted(records.items())]
    key = ("card", plan.digest, len(plan.shards), repr(sums), repr(errors))
    data: bytes = _once(key, lambda: card.render_card(plan, records, errors))
    return data


def render_loading(plan: Plan) -> bytes:
    data: bytes = _once(("loading", plan.digest), lambda: card.render_loading(plan))
    return data
