"""Start a host in this process, as its spec says."""

from __future__ import annotations

import warnings

from pipeline.attention.rows import can_build_for
from pipeline.garbage import collection_paused
from pipeline.protocol.hosts import Proposes, Samples, Scores
from pipeline.protocol.specs import GameSpec, HostSpec
from pipeline.worker.captured_sampling import CapturedSampling
from pipeline.worker.hosts import LanguageModelHost, RewardModelHost, TextModelHost
from pipeline.worker.loading import LoadedModel, load_language_model
from pipeline.worker.reward_loading import load_reward_model
from pipeline.worker.sampling_host import CapturingHost, SamplingHost
from pipeline.worker.text_loading import load_text_model


@collection_paused()
def start_scoring(spec: HostSpec) -> Scores:
    """A host beside the base's: a language model, also one with other tokens, or a reward model.

    Raises:
        ConfigurationError: the model cannot be served.
    """
    if spec.reward is not None:
        return RewardModelHost(load_reward_model(spec, spec.reward))
    if spec.text is not None:
        assert spec.text.retokeniser is not None
        return TextModelHost(load_text_model(spec, spec.text.retokeniser))
    return LanguageModelHost(_load(spec).runner)


@collection_paused()
def start_proposing(spec: HostSpec) -> Proposes:
    """The base's host. Raises ConfigurationError."""
    return LanguageModelHost(_load(spec).runner)


@collection_paused()
def start_sampling(spec: HostSpec, games: GameSpec) -> Samples:
    """A host that holds every role of the run. Raises ConfigurationError.

    On a GPU that kernels can be built for, its games are captured as CUDA graphs, where all rules of the run allow
    it.
    """
    loaded = _load(spec)
    in_slots = loaded.slot_runner
    if in_slots is not None and can_build_for(in_slots.device) and CapturedSampling.serves(games):
        return CapturingHost(in_slots, spec.roles, games)
    return SamplingHost(loaded.runner, spec.roles, games)


def _load(spec: HostSpec) -> LoadedModel:
    """Load a language model, with a warning where it can only be decoded one row at a time."""
    loaded = load_language_model(spec)
    if loaded.why_plain is not None:
        warnings.warn(
            f"{spec.title} is decoded one row at a time, which is slow: {loaded.why_plain}",
            RuntimeWarning,
            stacklevel=2,
        )
    return loaded
