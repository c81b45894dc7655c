"""Replicas in this process whose reward model can be looked at: a base and one reward model beside it."""

from __future__ import annotations

import gc
from dataclasses import dataclass

from pipeline.attention.branches import RowCache
from pipeline.config.sections import Config
from pipeline.engine.engine import Engine
from pipeline.protocol.hosts import Hosts
from pipeline.runtime.assembly import Assembly, assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import LocalHost, LocalProposingHost
from pipeline.worker.branch_runner import BranchRunner
from pipeline.worker.hosts import RewardModelHost
from pipeline.worker.reward_loading import load_reward_model
from pipeline.worker.start import start_proposing
from support.decoding import NOWHERE


@dataclass(frozen=True)
class RewardReplica:
    """An engine over a base and a reward model.

    Args:
        assembly: of the run.
        engine: decodes.
        host: of the reward model.
        runner: the reward model.
    """

    assembly: Assembly
    engine: Engine
    host: RewardModelHost
    runner: BranchRunner

    @classmethod
    def start(cls, config: Config) -> RewardReplica:
        """Load both models."""
        assembly = assemble(config, NOWHERE)
        (base_plan, plan), (base_spec, spec) = assembly.topology.hosts, assembly.hosts
        assert spec.reward is not None
        runner = load_reward_model(spec, spec.reward)
        host = RewardModelHost(runner)
        base = LocalProposingHost(start_proposing(base_spec), base_plan)
        return cls(assembly, make_engine(assembly, Hosts(base, (LocalHost(host, plan),))), host, runner)


def num_row_caches() -> int:
    """Rows of reward models whose keys and values are in memory."""
    gc.collect()
    return sum(type(each) is RowCache for each in gc.get_objects())
