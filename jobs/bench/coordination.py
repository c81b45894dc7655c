"""Measure what coordination over Ray costs: real engines, real calls, real games, and hosts whose forward pass is a
sleep of a given length, so that any number of them fits on one machine.

A benchmark, no test: it says what was measured on this machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from jobs.bench.models import GivenPrompts
from pipeline.cluster.host_actors import HostActor, RayHost, hosts_of, send_tensors_as_arrays
from pipeline.cluster.processes import call_all, local_cluster, started
from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.config.variants import lay_out
from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import Candidates, MemoryBudget, Position, Step, Terms, TokenOutcome
from pipeline.protocol.specs import GameSpec
from pipeline.protocol.topology import HostRole
from pipeline.records import Row
from pipeline.runtime.assembly import Assembly
from pipeline.runtime.engines import MIN_SLOTS_FOR_GROUPS, make_engine
from pipeline.runtime.topology import build_topology
from pipeline.runtime.wiring import unwrapped
from pipeline.worker.hosts import LanguageModelHost
from pipeline.worker.sampling_host import SamplingHost

NUM_CANDIDATES, VOCAB_SIZE, ENDLESS = 50, 49_152, 1_000_000
WARM_STEPS = 20


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement. `of_ideal` compares with hosts that never wait; `tokens_per_s` is of all replicas.

    `device` is "cpu" where a host is busy while it computes, and "gpu" where its device goes on by itself.
    """

    forward_ms: float
    device: str
    hosts: int
    replicas: int
    slots: int
    tokens_per_s: float
    of_ideal: float


class SimulatedRunner:
    """A runner whose forward pass is a sleep and whose candidates are drawn at random (`LanguageRunner`).

    As a GPU it does not wait for a pass; `ready_s` is when the last one ends.
    """

    def __init__(self, num_roles: int, num_slots: int, *, is_gpu: bool) -> None:
        self._num_roles = num_roles
        self._is_gpu = is_gpu
        self.newest_S = torch.zeros(num_slots, dtype=torch.long)
        self.forward_s = self.ready_s = 0.0
        self._generator = torch.Generator().manual_seed(0)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def work(self) -> tuple[int, int, float]:
        return 0, 0, 0.0

    @property
    def cache_bytes(self) -> int:
        return 0

    def advance(self, step: Step) -> None:
        self.ready_s = max(self.ready_s, time.perf_counter()) + self.forward_s
        if not self._is_gpu:
            _sleep_until(self.ready_s)

    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        ids_BK = torch.randint(VOCAB_SIZE, (len(slots), NUM_CANDIDATES), generator=self._generator)
        role_logprobs_BRK = self.logprobs_at(slots, ids_BK)
        base_BK = role_logprobs_BRK[:, 0]
        return Candidates(ids_BK, base_BK, base_BK.exp().sum(-1), role_logprobs_BRK)

    def logprobs_at(self, slots: Sequence[int], ids_BK: Tensor | None) -> Tensor:
        shape = (len(slots), self._num_roles, NUM_CANDIDATES)
        return torch.randn(shape, generator=self._generator).log_softmax(-1)

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        return torch.zeros(self._num_roles, len(answer))

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        return MemoryBudget("here", "cpu", 1, 1)

    def resize(self, num_slots: int) -> None:
        self.newest_S = torch.zeros(num_slots, dtype=torch.long)


class SimulatedGpuHost(SamplingHost):
    """A host that solves all games in no time, on a device that goes on by itself.

    It solves the first games for real and gives their outcomes ever after.
    """

    def __init__(self, runner: SimulatedRunner, roles: Sequence[HostRole], games: GameSpec) -> None:
        super().__init__(runner, roles, games)
        self._simulated = runner
        self._outcomes: list[TokenOutcome] = []
        self._newest: Reply[list[TokenOutcome]] | None = None

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        self.advance(at, step)
        if len(self._outcomes) != len(slots):
            self._outcomes = self.sample(at, slots, terms, uniforms).result()
        if self._newest is not None:  # as a host that corrects a token where it has to
            self._newest.result()
        ready_s = self._simulated.ready_s
        self._newest = Reply(lambda: self._outcomes_at(ready_s))
        return self._newest

    def _outcomes_at(self, moment_s: float) -> list[TokenOutcome]:
        _sleep_until(moment_s)
        return self._outcomes


def _sleep_until(moment_s: float) -> None:
    time.sleep(max(0.0, moment_s - time.perf_counter()))


class SimulatedActor(HostActor):
    """A host's actor whose host is simulated."""

    def __init__(self, config: Config, index: int, is_gpu: bool) -> None:
        super().__init__((None,), index, unwrapped)
        torch.set_num_threads(1)
        send_tensors_as_arrays()
        topology = build_topology(config)
        roles = topology.hosts[index].roles
        self._runner = runner = SimulatedRunner(len(roles), config.cluster.first_slots, is_gpu=is_gpu)
        if len(topology.hosts) > 1:
            self.serve_proposing(LanguageModelHost(runner))
            return
        rules = frozenset(variant.rule for variant in lay_out(config))
        games = GameSpec(config.decoding.sampling, topology.principals, rules)
        self.serve_sampling(SimulatedGpuHost(runner, roles, games) if is_gpu else SamplingHost(runner, roles, games))

    def pace(self, forward_s: float) -> None:
        """Take so long for a forward pass from now on."""
        self._runner.forward_s = forward_s


class SimulatedReplica:
    """A coordinator's engine over simulated hosts."""

    def __init__(self, config: Config, actors: Sequence[Any]) -> None:
        torch.set_num_threads(1)
        topology = build_topology(config)
        hosts = hosts_of([RayHost([actor], plan, 60.0) for plan, actor in zip(topology.hosts, actors, strict=True)])
        prompter = GivenPrompts([{role: [1, 2, 3] for role in topology.roles}])
        self._engine = make_engine(Assembly(config, topology, (), {}, prompter, lay_out(config)), hosts)
        for at in range(config.cluster.first_slots):
            self._engine.admit(Row(str(at), ({"role": "user", "content": "0"},)))

    def run(self, seconds: float) -> float:
        """Tokens per second while every slot runs."""
        for _ in range(WARM_STEPS):
            self._engine.step()
        before, started_s = self._engine.num_row_steps, time.perf_counter()
        while time.perf_counter() - started_s < seconds:
            self._engine.step()
        return (self._engine.num_row_steps - before) / (time.perf_counter() - started_s)


def make_config(num_hosts: int, slots: int) -> Config:
    """A base and one autoregressive reward model a further host."""
    arm = {"kind": "arm", "reference": "none", "weight": 0.5}
    return parse_config(
        {
            "input": {"path": "none"},
            "output": {"path": "none"},
            "base": "base",
            "principals": {f"p{at}": {**arm, "model": f"model{at}"} for at in range(1, num_hosts)},
            "decoding": {"max_new_tokens": ENDLESS, "agent_temperature": 1.0, "trace": "none", "draft": "off"},
            "cluster": {"slots": slots},
        }
    )


def run_bench_coordination(
    *,
    forwards_ms: Sequence[float],
    hosts: Sequence[int],
    replicas: Sequence[int],
    slots: int,
    seconds: float,
    json_file: Path | None,
) -> None:
    """Measure hosts with one replica (a lone one as a GPU's, too), then replicas with two hosts; print a table, write
    the file."""
    shapes = list(dict.fromkeys([*((count, 1) for count in hosts), *((2, count) for count in replicas)]))
    num_actors = max(num_hosts * num_replicas + num_replicas for num_hosts, num_replicas in shapes)
    with local_cluster(num_cpus=num_actors):
        cells = [cell for shape in shapes for cell in measure(forwards_ms, *shape, slots, seconds)]
        if 1 in hosts:
            cells += measure(forwards_ms, 1, 1, slots, seconds, is_gpu=True)
    print_table(cells)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n", encoding="utf-8")


def measure(
    forwards_ms: Sequence[float],
    num_hosts: int,
    num_replicas: int,
    slots: int,
    seconds: float,
    *,
    is_gpu: bool = False,
) -> list[Cell]:
    """A cell for each length of a forward pass; all replicas run at the same time."""
    config = make_config(num_hosts, slots)
    num_groups = 2 if num_hosts > 1 and slots >= MIN_SLOTS_FOR_GROUPS else 1
    hosts = [(config, at, is_gpu) for _ in range(num_replicas) for at in range(num_hosts)]
    cells = []
    with started(SimulatedActor, hosts) as actors:
        by_replica = [actors[at : at + num_hosts] for at in range(0, len(actors), num_hosts)]
        with started(SimulatedReplica, [(config, each) for each in by_replica]) as replicas:
            for forward_ms in forwards_ms:
                call_all(actors, "pace", forward_ms / 1e3)
                rate = sum(call_all(replicas, "run", seconds))
                ideal = num_replicas * slots / num_groups / (forward_ms / 1e3)
                device = "gpu" if is_gpu else "cpu"
                cells.append(Cell(forward_ms, device, num_hosts, num_replicas, slots, rate, rate / ideal))
    return cells


def print_table(cells: Sequence[Cell]) -> None:
    table = Table(title="Simulated forward passes, real coordination over Ray", box=None)
    for name in ("forward ms", "as on a", "hosts", "replicas", "slots", "tokens/s", "of ideal"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(
            f"{cell.forward_ms:g}",
            cell.device,
            str(cell.hosts),
            str(cell.replicas),
            str(cell.slots),
            f"{cell.tokens_per_s:,.0f}",
            f"{cell.of_ideal:.1%}",
        )
    Console().print(table)
