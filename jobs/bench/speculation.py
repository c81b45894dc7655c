"""`cage bench speculation`: what drafts save, by workload, temperature and number of slots, beside the same without.

Every case decodes the same rows over the same loaded model, without drafts and with them in turn, and refuses to go
on where their records differ. Passes and accepted tokens are counts. Speed is by the process's own seconds, which
other processes on the machine change less than those of the clock; both are in the file. Of several pairs of runs the
median counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.engine.engine import Engine, decode_rows
from pipeline.errors import ConfigurationError
from pipeline.hub.embedded import default_cache_folder
from pipeline.hub.model_facts import read_model_facts
from pipeline.hub.sources import resolve_model
from pipeline.protocol.hosts import Hosts
from pipeline.records import Record, Row
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_hosts

PRINCIPALS = {
    "cheerful": {"kind": "prompted", "principle": "You are warm, cheerful and encouraging.", "weight": 0.6},
    "brief": {"kind": "prompted", "principle": "You are terse. Answer in one short sentence.", "weight": 0.4},
}
SHORT_PROMPT = 6  # words
WEIGHTS = [{"cheerful": at / 4, "brief": 1 - at / 4} for at in range(5)]

Tree = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of run.

    Args:
        name: of it.
        temperature: of the draws; 0 is greedy.
        existing: how the base made the existing answers: "same" draws, "seed", another one, or "short", from the
            beginning of the prompt; None: there are none.
        decoding: its section.
        grid: its section.
        has_model: whether a model proposes tokens, instead of texts.
    """

    name: str
    temperature: float
    existing: str | None
    decoding: Tree
    grid: Tree
    has_model: bool = False


GRID = {"weights": WEIGHTS, "rules": ["equilibrium", "linear"]}
WORKLOADS = (
    Workload("relabel: base's own, tau 1", 0.0, "same", {"agent_temperature": 1.0}, {}),
    Workload("relabel: base's own, tau 0.3", 0.0, "same", {"agent_temperature": 0.3}, {}),
    Workload("relabel: shorter prompt's", 0.0, "short", {"agent_temperature": 1.0}, {}),
    Workload("relabel: base's own, other seed", 1.0, "seed", {"agent_temperature": 1.0}, {}),
    Workload("grid: 5 weights x 2 rules", 0.0, None, {"agent_temperature": 1.0}, GRID),
    Workload("grid: 5 weights x 2 rules, sampled", 1.0, None, {"agent_temperature": 1.0}, GRID),
    Workload("synthesis: n = 4", 1.0, None, {"agent_temperature": 0.3, "n": 4}, {}),
    Workload("weak-to-strong: greedy", 0.0, None, {"agent_temperature": 1.0}, {}, has_model=True),
    Workload("weak-to-strong: sampled", 1.0, None, {"agent_temperature": 1.0}, {}, has_model=True),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One case.

    Attributes:
        workload, temperature, slots: what was decoded.
        tokens: drawn in each of the two runs.
        passes: of the base with drafts, each row of a batch counting its own; without, as many as tokens.
        drafted: tokens that were verified.
        accepted: tokens among them that were drawn.
        accepted_by_source: likewise.
        tokens_per_cpu_s: with drafts, by the process's own seconds.
        speedup: that as a share of the same without drafts.
        clock_speedup: the same by the clock.
        speedups: of every pair of runs, by the process's own seconds.

    Counts are those of the first pair: what is drafted depends on what passes take, so others differ a little.
    """

    workload: str
    temperature: float
    slots: int
    tokens: int
    passes: int
    drafted: int
    accepted: int
    accepted_by_source: Mapping[str, int]
    tokens_per_cpu_s: float
    speedup: float
    clock_speedup: float
    speedups: Sequence[float]


def run_bench_speculation(
    *,
    model: str,
    prompts: Path,
    num_rows: int,
    max_new_tokens: int,
    slots: Sequence[int],
    repeats: int,
    workloads: Sequence[str],
    json_file: Path | None,
    draft_model: Tree,
) -> None:
    """Measure every workload whose name begins with one of `workloads` (all without any); print, write the file.

    `draft_model` is that section, for workloads with a model; where it names neither a model nor a number of layers,
    five sixths of the base's layers propose.

    Raises:
        ConfigurationError: a chosen workload cannot run; nothing was measured then.
    """
    chosen = [each for each in WORKLOADS if not workloads or each.name.startswith(tuple(workloads))]
    if not chosen:
        known = ", ".join(dict.fromkeys(each.name for each in WORKLOADS))
        raise ConfigurationError(f"--workload must be the beginning of one of: {known}; got {', '.join(workloads)}")
    if not prompts.is_file():
        raise ConfigurationError(f"--prompts: there is no file {prompts}; give JSONL with the columns id and prompt")
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()[:num_rows]]
    rows = [Row(str(line["id"]), ({"role": "user", "content": line["prompt"]},)) for line in lines]
    if any(each.has_model for each in chosen):
        draft_model = _with_layers(draft_model, model)
    bench = _Bench(model, max_new_tokens, draft_model)
    for workload, num_slots in product(chosen, slots):
        bench.check(workload, num_slots)
    measured = []
    for workload, num_slots in product(chosen, slots):
        measured.append(bench.measure(workload, rows, num_slots, repeats))
        print_row(measured[-1])
    print_table(measured)
    if json_file is not None:
        tree = {"model": model, "draft_model": draft_model, "rows": len(rows), "max_new_tokens": max_new_tokens,
                "repeats": repeats, "cases": [asdict(each) for each in measured]}  # fmt: skip
        json_file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _with_layers(draft_model: Tree, base: str) -> Tree:
    """The section, with five sixths of the base's layers where the base proposes and no number was given."""
    if draft_model.get("model") is not None or draft_model.get("layers") is not None:
        return draft_model
    facts = read_model_facts(resolve_model(base, cache_folder=default_cache_folder(os.environ)))
    return {**draft_model, "layers": max(1, 5 * (facts.num_layers or 0) // 6)}


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Records by answer, the process's and the clock's seconds, and the engine."""

    records: Mapping[tuple[str, int, int], Record]
    cpu_s: float
    clock_s: float
    engine: Engine


class _Bench:
    """Loads the model once for each temperature, which hosts draw by.

    Args:
        model: folder, hub id or name.
        max_new_tokens: of an answer.
        draft_model: its section.
    """

    def __init__(self, model: str, max_new_tokens: int, draft_model: Tree) -> None:
        self._model, self._max_new_tokens, self._draft_model = model, max_new_tokens, draft_model
        self._loaded: dict[float, Hosts] = {}
        self._existing: dict[str, list[Row]] = {}

    def check(self, workload: Workload, num_slots: int) -> None:
        """Plan both runs. Raises ConfigurationError where one cannot be."""
        for drafts in ({"draft": "off"}, self._drafts(workload)):
            assemble(self._config(workload, num_slots, drafts), default_cache_folder(os.environ))

    def _drafts(self, workload: Workload) -> Tree:
        """What has tokens proposed."""
        return {"draft": ["model"], "draft_model": self._draft_model} if workload.has_model else {"draft": "auto"}

    def measure(self, workload: Workload, rows: Sequence[Row], num_slots: int, repeats: int) -> Measured:
        """Decode the rows without drafts and with them, `repeats` times. Raises RuntimeError where records differ."""
        rows = self._with_existing(workload, rows)
        pairs = [self._pair(workload, rows, num_slots, is_reversed=bool(at % 2)) for at in range(repeats)]
        _, drafted = pairs[0]
        tallies = {} if drafted.engine.drafter is None else drafted.engine.drafter.tallies
        tokens = sum(record.num_tokens for record in drafted.records.values())
        speedups = [plain.cpu_s / other.cpu_s for plain, other in pairs]
        return Measured(
            workload.name,
            workload.temperature,
            num_slots,
            tokens,
            sum(record.num_passes for record in drafted.records.values()),
            sum(tally.drafted for tally in tallies.values()),
            sum(tally.accepted for tally in tallies.values()),
            {str(source): tally.accepted for source, tally in tallies.items()},
            tokens / median(other.cpu_s for _, other in pairs),
            median(speedups),
            median(plain.clock_s / other.clock_s for plain, other in pairs),
            speedups,
        )

    def _pair(
        self, workload: Workload, rows: Sequence[Row], num_slots: int, *, is_reversed: bool
    ) -> tuple[_Decoded, _Decoded]:
        """Without drafts and with them; what comes second finds a warmer machine, so that turns."""
        both: list[Tree] = [{"draft": "off"}, self._drafts(workload)]
        turn = -1 if is_reversed else 1
        plain, drafted = [self._decode(workload, rows, num_slots, drafts) for drafts in both[::turn]][::turn]
        if plain.records != drafted.records:
            raise RuntimeError(f"{workload.name} with {num_slots} slots: records differ with drafts")
        return plain, drafted

    def _with_existing(self, workload: Workload, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows with the answers that the base makes as the workload says."""
        if (how := workload.existing) is None:
            return rows
        if how not in self._existing:
            asked = [replace(row, messages=_shortened(row)) for row in rows] if how == "short" else rows
            by_base = {"rule": "base", "seed": int(how == "seed")}
            maker = replace(workload, decoding=by_base)
            records = self._decode(maker, asked, max(len(rows), 1), {"draft": "off"}).records
            self._existing[how] = [replace(row, response=records[row.row_id, 0, 0].response) for row in rows]
        return self._existing[how]

    def _decode(self, workload: Workload, rows: Sequence[Row], num_slots: int, drafts: Tree) -> _Decoded:
        config = self._config(workload, num_slots, drafts)
        assembly = assemble(config, default_cache_folder(os.environ))
        if workload.temperature not in self._loaded:
            specs = tuple(replace(spec, drafts=True) for spec in assembly.hosts)
            self._loaded[workload.temperature] = start_hosts(replace(assembly, hosts=specs))
        hosts, variants = self._loaded[workload.temperature], assembly.variants
        engine = make_engine(assembly, hosts)
        engine.resize()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        found = decode_rows(engine, rows, num_variants=len(variants), num_samples=config.decoding.n)
        records = {(each.row_id, each.variant, each.sample): each for each in found}
        return _Decoded(records, time.process_time() - began_cpu_s, time.perf_counter() - began_s, engine)

    def _config(self, workload: Workload, num_slots: int, drafts: Tree) -> Config:
        return parse_config(
            {
                "input": {"path": "unused"},
                "output": {"path": "unused"},
                "base": {"model": self._model, "device": "cpu"},
                "principals": PRINCIPALS,
                "decoding": {
                    "max_new_tokens": self._max_new_tokens,
                    "temperature": workload.temperature,
                    "trace": "tokens",
                    **drafts,
                    **workload.decoding,
                },
                "grid": workload.grid,
                "cluster": {"slots": num_slots, "transport": "local"},
            }
        )


def _shortened(row: Row) -> tuple[dict[str, Any], ...]:
    """The prompt's first words."""
    words = row.messages[0]["content"].split()[:SHORT_PROMPT]
    return ({"role": "user", "content": " ".join(words)},)


def print_row(measured: Measured) -> None:
    """A line while the benchmark runs."""
    share = measured.passes / measured.tokens
    print(f"{measured.workload}, {measured.slots} slots: {share:.2f} passes a token", flush=True)


def print_table(measured: Sequence[Measured]) -> None:
    """A row for each case."""
    table = Table(title="Drafts, beside the same without them; records are equal in every case", padding=(0, 0))
    for column in ("workload", "draws", "slots", "passes a token", "accepted of drafted", "tokens/CPU s", "speed"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for each in measured:
        table.add_row(
            each.workload,
            "greedy" if each.temperature == 0 else "sampled",
            str(each.slots),
            f"{each.passes / each.tokens:.2f}",
            f"{each.accepted:,} of {each.drafted:,}",
            f"{each.tokens_per_cpu_s:.1f}",
            f"{each.speedup:.2f}",
        )
    console = Console()
    console.width = max(console.width, 118)  # a narrower table wraps its numbers
    console.print(table)
