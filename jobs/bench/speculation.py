"""`cage bench speculation`: what drafts save, by workload, temperature and number of slots, beside the same without.

Every case decodes the same rows over the same loaded model, without drafts and with them in turn, and refuses to go
on where their records differ. Passes and accepted tokens are counts. Speed on a CPU is by the process's own seconds,
which other processes on the machine change less than those of the clock; both are in the file. On a GPU it is by the
clock, from idle to idle, after a pair of runs that is not counted. Of several pairs of runs the median counts.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from jobs.bench.models import SHAPES, Work, make_assembly, make_work, save_random_model
from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.config.variants import lay_out, sampling_of
from pipeline.engine.engine import Engine, decode_rows
from pipeline.errors import ConfigurationError
from pipeline.hub.embedded import default_cache_folder
from pipeline.hub.model_facts import read_model_facts
from pipeline.hub.sources import resolve_model
from pipeline.protocol.hosts import Hosts
from pipeline.protocol.specs import Drafts
from pipeline.protocol.topology import HostRole
from pipeline.records import Record, Row
from pipeline.runtime.assembly import Assembly, assemble
from pipeline.runtime.drafts import DRAFT, draft_section
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_hosts
from pipeline.worker.devices import pick_device
from pipeline.worker.draft_model import DraftModel
from pipeline.worker.start import start_drafting

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
        tokens_per_s: with drafts, by the process's own seconds; on a GPU by the clock.
        speedup: that as a share of the same without drafts.
        clock_speedup: the same by the clock.
        speedups: of every pair of runs, by the same seconds as `speedup`.

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
    tokens_per_s: float
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
    device: str = "cpu",
    dtype: str = "auto",
    shape: str | None = None,
) -> None:
    """Measure every workload whose name begins with one of `workloads` (all without any); print, write the file.

    `draft_model` is that section, for workloads with a model; where it names neither a model nor a number of layers,
    five sixths of the base's layers propose. With a `shape` weights and prompts are random, and a quarter of the
    layers tells most of what the model draws; so many propose.

    Raises:
        ConfigurationError: a chosen workload cannot run; nothing was measured then.
    """
    chosen = [each for each in WORKLOADS if not workloads or each.name.startswith(tuple(workloads))]
    if not chosen:
        known = ", ".join(dict.fromkeys(each.name for each in WORKLOADS))
        raise ConfigurationError(f"--workload must be the beginning of one of: {known}; got {', '.join(workloads)}")
    if shape is not None and shape not in SHAPES:
        raise ConfigurationError(f"--shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    if shape is None and not prompts.is_file():
        raise ConfigurationError(f"--prompts: there is no file {prompts}; give JSONL with the columns id and prompt")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = None
        if shape is None:
            lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()[:num_rows]]
            rows = [Row(str(line["id"]), ({"role": "user", "content": line["prompt"]},)) for line in lines]
        else:
            num_telling = max(1, SHAPES[shape]["num_hidden_layers"] // 4)
            model = str(save_random_model(shape, Path(folder) / "model", num_telling=num_telling))
            work = _random_work(num_rows, SHAPES[shape]["vocab_size"], max_new_tokens)
            rows = [replace(row, max_new_tokens=None) for row in work.rows]
            if draft_model.get("model") is None and draft_model.get("layers") is None:
                draft_model = {**draft_model, "layers": num_telling}
        if any(each.has_model for each in chosen):
            draft_model = _with_layers(draft_model, model)
        bench = _Bench(Setup(model, max_new_tokens, draft_model, device, dtype, work))
        for workload, num_slots in product(chosen, slots):
            bench.check(workload, num_slots)
        measured = []
        for workload, num_slots in product(chosen, slots):
            measured.append(bench.measure(workload, rows, num_slots, repeats))
            print_row(measured[-1])
    name = torch.cuda.get_device_name() if bench.is_on_gpu else "cpu"
    print_table(measured, "clock" if bench.is_on_gpu else "CPU")
    if json_file is not None:
        tree = {"model": model if shape is None else f"random {shape}", "device": name, "dtype": dtype,
                "draft_model": draft_model, "rows": len(rows), "max_new_tokens": max_new_tokens, "repeats": repeats,
                "cases": [asdict(each) for each in measured]}  # fmt: skip
        json_file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _with_layers(draft_model: Tree, base: str) -> Tree:
    """The section, with five sixths of the base's layers where the base proposes and no number was given."""
    if draft_model.get("model") is not None or draft_model.get("layers") is not None:
        return draft_model
    facts = read_model_facts(resolve_model(base, cache_folder=default_cache_folder(os.environ)))
    return {**draft_model, "layers": max(1, 5 * (facts.num_layers or 0) // 6)}


def _random_work(num_rows: int, vocab_size: int, max_length: int) -> Work:
    """Prompts of random tokens for the base and both principals."""
    roles = {"base": "base", **{f"p{at}": name for at, name in enumerate(PRINCIPALS)}}
    work = make_work(
        [*roles], num_rows=num_rows, vocab_size=vocab_size, mean_length=max_length, max_length=max_length
    )
    return replace(work, prompts=[{roles[role]: ids for role, ids in prompt.items()} for prompt in work.prompts])


@dataclass(frozen=True, slots=True)
class Setup:
    """What all cases share.

    Args:
        model: folder, hub id or name.
        max_new_tokens: of an answer.
        draft_model: its section.
        device: of the base.
        dtype: of its weights.
        work: prompts of token ids, by the rows' texts; None: texts are what a tokenizer reads.
    """

    model: str
    max_new_tokens: int
    draft_model: Tree
    device: str
    dtype: str
    work: Work | None


@dataclass(frozen=True, slots=True)
class _Decoded:
    """Records by answer, the process's and the clock's seconds, and the engine."""

    records: Mapping[tuple[str, int, int], Record]
    cpu_s: float
    clock_s: float
    engine: Engine


class _Bench:
    """Loads the model once for each temperature, which hosts draw by; on a GPU for each set of rules as well, by
    which a host records its games or does not.

    Attributes:
        is_on_gpu: whether the base is.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.is_on_gpu = pick_device(setup.device).type == "cuda"
        self._loaded: dict[Hashable, Hosts] = {}
        self._draft_models: dict[float, DraftModel] = {}
        self._num_slots: dict[Hashable, int] = {}
        self._existing: dict[str, list[Row]] = {}

    def check(self, workload: Workload, num_slots: int) -> None:
        """Plan both runs. Raises ConfigurationError where one cannot be."""
        for drafts in ({"draft": "off"}, self._drafts(workload)):
            self._assemble(self._config(workload, num_slots, drafts))

    def _assemble(self, config: Config) -> Assembly:
        cache_folder, work = default_cache_folder(os.environ), self._setup.work
        if work is None:
            return assemble(config, cache_folder)
        source = resolve_model(self._setup.model, cache_folder=cache_folder)
        assembly = make_assembly(config, work, read_model_facts(source).vocab_size, cache_folder)
        [host] = assembly.hosts
        host = replace(host, device=self._setup.device, dtype=self._setup.dtype)
        section = draft_section(config)
        if section is None:
            return replace(assembly, hosts=(host,))
        draft = replace(
            host,
            name=DRAFT,
            serves=(DRAFT,),
            device=section.device,
            roles=(HostRole(DRAFT),),
            strict=False,
            games=None,
            layers=self._setup.draft_model.get("layers"),
        )
        return replace(assembly, hosts=(host,), draft=draft)

    def _drafts(self, workload: Workload) -> Tree:
        """What has tokens proposed."""
        if workload.has_model:
            return {"draft": ["model"], "draft_model": self._setup.draft_model}
        has_siblings = bool(workload.grid) or workload.decoding.get("n", 1) > 1
        there = {"response": workload.existing is not None, "siblings": has_siblings, "lookup": True}
        return {"draft": [source for source, is_there in there.items() if is_there]}  # auto has none on a GPU

    def measure(self, workload: Workload, rows: Sequence[Row], num_slots: int, repeats: int) -> Measured:
        """Decode the rows without drafts and with them, `repeats` times. Raises RuntimeError where records differ."""
        rows = self._with_existing(workload, rows)
        if self.is_on_gpu:  # passes of these slots are compiled and recorded
            self._pair(workload, rows, num_slots, is_reversed=False)
        pairs = [self._pair(workload, rows, num_slots, is_reversed=bool(at % 2)) for at in range(repeats)]
        _, drafted = pairs[0]
        tallies = {} if drafted.engine.drafter is None else drafted.engine.drafter.tallies
        tokens = sum(record.num_tokens for record in drafted.records.values())
        speedups = [self._seconds(plain) / self._seconds(other) for plain, other in pairs]
        return Measured(
            workload.name,
            workload.temperature,
            num_slots,
            tokens,
            sum(record.num_passes for record in drafted.records.values()),
            sum(tally.drafted for tally in tallies.values()),
            sum(tally.accepted for tally in tallies.values()),
            {str(source): tally.accepted for source, tally in tallies.items()},
            tokens / median(self._seconds(other) for _, other in pairs),
            median(speedups),
            median(plain.clock_s / other.clock_s for plain, other in pairs),
            speedups,
        )

    def _seconds(self, decoded: _Decoded) -> float:
        return decoded.clock_s if self.is_on_gpu else decoded.cpu_s

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
            # with weights of 0 the base draws by itself, whatever the rule: no other host has to be loaded
            asked = [replace(row, weights=dict.fromkeys(PRINCIPALS, 0.0)) for row in asked]
            maker = replace(workload, decoding={**workload.decoding, "seed": int(how == "seed")})
            records = self._decode(maker, asked, max(len(rows), 1), {"draft": "off"}).records
            self._existing[how] = [replace(row, response=records[row.row_id, 0, 0].response) for row in rows]
        return self._existing[how]

    def _decode(self, workload: Workload, rows: Sequence[Row], num_slots: int, drafts: Tree) -> _Decoded:
        config = self._config(workload, num_slots, drafts)
        assembly, variants = self._assemble(config), lay_out(config)
        key = workload.temperature, frozenset(each.rule for each in variants) if self.is_on_gpu else None
        if key not in self._loaded:
            specs = tuple(replace(spec, drafts=Drafts.ANYWHERE) for spec in assembly.hosts)
            self._loaded[key] = start_hosts(replace(assembly, hosts=specs))
        engine = make_engine(assembly, self._loaded[key], draft_model=self._draft_model(assembly))
        # on a GPU that has passes recorded again; elsewhere rows are to be forgotten
        if not self.is_on_gpu or self._num_slots.get(key) != num_slots:
            engine.resize()
            self._num_slots[key] = num_slots
        self._wait()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        found = decode_rows(engine, rows, num_variants=len(variants), num_samples=config.decoding.n)
        records = {(each.row_id, each.variant, each.sample): each for each in found}
        self._wait()
        return _Decoded(records, time.process_time() - began_cpu_s, time.perf_counter() - began_s, engine)

    def _wait(self) -> None:
        if self.is_on_gpu:
            torch.cuda.synchronize()

    def _draft_model(self, assembly: Assembly) -> DraftModel | None:
        """The loaded model that proposes tokens, which knows no text; None where none does."""
        if assembly.draft is None:
            return None
        temperature, num_slots = assembly.config.decoding.temperature, assembly.config.cluster.first_slots
        if temperature not in self._draft_models:
            sampling = sampling_of(assembly.config.decoding, assembly.variants)
            self._draft_models[temperature] = start_drafting(assembly.draft, sampling)
        model = self._draft_models[temperature]
        if model.num_slots == num_slots:
            model.forget()
        else:
            model.resize(num_slots)
        return model

    def _config(self, workload: Workload, num_slots: int, drafts: Tree) -> Config:
        return parse_config(
            {
                "input": {"path": "unused", **({"response": "response"} if workload.existing is not None else {})},
                "output": {"path": "unused"},
                "base": {"model": self._setup.model, "device": self._setup.device, "dtype": self._setup.dtype},
                "principals": PRINCIPALS,
                "decoding": {
                    "max_new_tokens": self._setup.max_new_tokens,
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
    speed = f"{measured.tokens_per_s:.1f} tokens/s, {measured.speedup:.2f} times as many as without"
    print(f"{measured.workload}, {measured.slots} slots: {share:.2f} passes a token, {speed}", flush=True)


def print_table(measured: Sequence[Measured], seconds: str) -> None:
    """A row for each case; `seconds` says which ones speed is by."""
    table = Table(title="Drafts, beside the same without them; records are equal in every case", padding=(0, 0))
    for column in (
        "workload",
        "draws",
        "slots",
        "passes a token",
        "accepted of drafted",
        f"tokens/{seconds} s",
        "speed",
    ):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for each in measured:
        table.add_row(
            each.workload,
            "greedy" if each.temperature == 0 else "sampled",
            str(each.slots),
            f"{each.passes / each.tokens:.2f}",
            f"{each.accepted:,} of {each.drafted:,}",
            f"{each.tokens_per_s:.1f}",
            f"{each.speedup:.2f}",
        )
    console = Console()
    console.width = max(console.width, 118)  # a narrower table wraps its numbers
    console.print(table)
