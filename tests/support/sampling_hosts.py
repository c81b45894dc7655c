"""A lone host of a tiny model that samples by itself, with and without games captured as CUDA graphs are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.sections import Config
from pipeline.engine.engine import decode_rows
from pipeline.protocol.hosts import Hosts
from pipeline.protocol.specs import GameSpec
from pipeline.records import Record, Row
from pipeline.runtime.assembly import Assembly, assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import LocalSamplingHost
from pipeline.worker.cuda_graphs import GraphPool
from pipeline.worker.language_model_runner import LanguageModelRunner
from pipeline.worker.sampling_host import CapturingHost, SamplingHost
from support.decoding import NOWHERE, ask, config_of
from support.language_models import load_in_slots

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
FOUR = {
    **PAIR,
    "odd": {"kind": "prompted", "principle": "be odd", "weight": 0.5},
    "loud": {"kind": "prompted", "principle": "SHOUT", "weight": 0.3},
}
ROWS = [ask(f"r{at}", "tell me " * (at % 4) + "x" * (at + 1)) for at in range(9)]
MANY_ROWS = [ask(f"r{at}", "tell me " * (at % 5) + "x" * (7 * at % 11 + 1)) for at in range(20)]


def config_of_lone_host(
    base: Path, principals: Mapping[str, Any] = PAIR, *, slots: int = 4, **decoding: Any
) -> Config:
    """A run whose principals all share the base's weights; `decoding` adds to that section."""
    options = {"max_new_tokens": 18, "trace": "tokens", "agent_temperature": 0.2, "temperature": 1.2, "draft": "off"}
    return config_of(base, principals, decoding=options | decoding, cluster={"slots": slots})


@dataclass(frozen=True)
class LoneHost:
    """A host that holds every role of a run, and what is behind it.

    Args:
        assembly: of the run.
        runner: the model.
        host: solves and samples.
    """

    assembly: Assembly
    runner: LanguageModelRunner
    host: SamplingHost

    @classmethod
    def start(cls, config: Config, *, captures: bool, has_fixed_shapes: bool | None = None) -> LoneHost:
        """Load the model.

        Args:
            config: of the run.
            captures: whether games are solved as a GPU's captured graphs do.
            has_fixed_shapes: whether passes have fixed shapes, as on a GPU; None: as the device wants.
        """
        assembly = assemble(config, NOWHERE)
        (spec,) = assembly.hosts
        runner = load_in_slots(spec, has_fixed_shapes=has_fixed_shapes)
        assert spec.games is not None
        make = CapturingHost if captures else SamplingHost
        return cls(assembly, runner, make(runner, spec.roles, spec.games))

    @property
    def games(self) -> GameSpec:
        """What its games are made of."""
        games = self.assembly.hosts[0].games
        assert games is not None
        return games

    def prompts(self, *tokens: int) -> dict[str, list[int]]:
        """The same prompt for every role."""
        return {role: list(tokens) for role in self.assembly.topology.roles}

    def decode(
        self, rows: Iterable[Row] = ROWS, *, runs_ahead: bool = True, num_samples: int = 1
    ) -> dict[str, Record]:
        """Decode in this process; by "id/sample" where there are several samples.

        Args:
            rows: the input.
            runs_ahead: whether the host is sent a step before the tokens of the last one are there.
            num_samples: answers to each row.
        """
        client = LocalSamplingHost(self.host, self.assembly.topology.hosts[0])
        engine = make_engine(self.assembly, Hosts.lone(client, runs_ahead=runs_ahead))
        records = decode_rows(engine, rows, num_samples=num_samples)
        return {f"{each.row_id}/{each.sample}" if num_samples > 1 else each.row_id: each for each in records}


def assert_same(one: Mapping[str, Record], other: Mapping[str, Record], tolerance: float = 1e-5) -> None:
    """Both have the same tokens, and numbers that differ by rounding alone."""
    assert one
    assert one.keys() == other.keys()
    for row_id, record in one.items():
        twin = other[row_id]
        assert record.response == twin.response
        assert record.num_unsolved == twin.num_unsolved
        for token, same in zip(record.tokens, twin.tokens, strict=True):
            assert token.token_id == same.token_id
            for name in ("base_logprob", "logprob", "payments", "thresholds"):
                assert getattr(token, name) == pytest.approx(getattr(same, name), abs=tolerance)
        assert record.max_residual is not None
        assert record.max_residual <= 1e-4
        assert record.rewards == pytest.approx(twin.rewards, abs=20 * tolerance)


def watch_graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The names of all graphs that are run from now on, in order."""
    names: list[object] = []
    run = GraphPool.run

    def watched(self: GraphPool, name: Any, function: Callable[[], Any]) -> Any:
        names.append(name)
        return run(self, name, function)

    monkeypatch.setattr(GraphPool, "run", watched)
    return names


def watch_pools(monkeypatch: pytest.MonkeyPatch, *, device: torch.device | None = None) -> list[GraphPool]:
    """All pools of graphs that are made from now on, in order; `device` takes the place of theirs."""
    pools: list[GraphPool] = []
    begin = GraphPool.__init__

    def watched(self: GraphPool, own: torch.device, what: str, **options: Any) -> None:
        begin(self, device or own, what, **options)
        pools.append(self)

    monkeypatch.setattr(GraphPool, "__init__", watched)
    return pools
