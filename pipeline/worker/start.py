"""Start a host in this process, as its spec says."""

from __future__ import annotations

from pipeline.attention.rows import can_build_for
from pipeline.protocol.hosts import Proposes, Samples, Scores
from pipeline.protocol.specs import GameSpec, HostSpec
from pipeline.worker.captured_sampling import CapturedSampling
from pipeline.worker.hosts import LanguageModelHost, RewardModelHost
from pipeline.worker.loading import load_language_model
from pipeline.worker.reward_loading import load_reward_model
from pipeline.worker.sampling_host import CapturingHost, SamplingHost


def start_scoring(spec: HostSpec) -> Scores:
    """A host beside the base's: a language model or a reward model. Raises ConfigurationError."""
    if spec.reward is not None:
        return RewardModelHost(load_reward_model(spec, spec.reward))
    return LanguageModelHost(load_language_model(spec))


def start_proposing(spec: HostSpec) -> Proposes:
    """The base's host. Raises ConfigurationError."""
    return LanguageModelHost(load_language_model(spec))


def start_sampling(spec: HostSpec, games: GameSpec) -> Samples:
    """A host that holds every role of the run. Raises ConfigurationError.

    On a GPU that kernels can be built for, its games are captured as CUDA graphs, where all rules of the run allow
    it.
    """
    runner = load_language_model(spec)
    if can_build_for(runner.device) and CapturedSampling.serves(games):
        return CapturingHost(runner, spec.roles, games)
    return SamplingHost(runner, spec.roles, games)
