"""Start a host in this process, as its spec says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pipeline.attention.rows import can_build_for
from pipeline.errors import ConfigurationError
from pipeline.garbage import collection_paused
from pipeline.protocol.hosts import Proposes, Samples, Scores
from pipeline.protocol.specs import GameSpec, HostSpec, RankPlace, SamplingOptions
from pipeline.worker.captured_sampling import CapturedSampling
from pipeline.worker.devices import pick_device
from pipeline.worker.draft_model import DraftModel
from pipeline.worker.hosts import LanguageModelHost, RewardModelHost, TextModelHost
from pipeline.worker.loading import LoadedModel, load_language_model
from pipeline.worker.ranks import FollowingHost, join, num_ranks
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
def start_drafting(spec: HostSpec, sampling: SamplingOptions) -> DraftModel:
    """The model that proposes tokens. Raises ConfigurationError."""
    runner = _load(spec).slot_runner
    if runner is None:
        raise ConfigurationError(f"{spec.title} keeps states, which cannot go back to before a rejected token")
    return DraftModel(runner, sampling, runner.passes.context_length)


@collection_paused()
def start_sampling(spec: HostSpec, games: GameSpec) -> Samples:
    """A host that holds every role of the run. Raises ConfigurationError.

    On a GPU that kernels can be built for, its games are captured as CUDA graphs, where all rules of the run allow
    it.
    """
    loaded = _load(spec)
    in_slots = loaded.slot_runner
    is_captured = in_slots is not None and can_build_for(in_slots.device) and CapturedSampling.serves(games)
    # ranks wait for the drawn tokens, and a graph is of one GPU
    is_whole = spec.tensor_parallel == spec.pipeline_parallel == 1
    if in_slots is not None and is_captured and is_whole:
        return CapturingHost(in_slots, spec.roles, games)
    return SamplingHost(loaded.runner, spec.roles, games)


def start_rank(
    spec: HostSpec,
    place: RankPlace,
    *,
    is_base: bool,
    wrap_host: Callable[[Any], Any],
    store: Any = None,
) -> Samples:
    """This process's rank of a host that is split over several; the first one answers as the whole host would.

    Args:
        spec: of the host.
        place: which rank this is.
        is_base: whether the host is the base's.
        wrap_host: called with the rank's host; what it returns takes the host's place.
        store: where it is the rank that opened the group's store.

    Raises:
        ConfigurationError: the model cannot be served, or there is no GPU for the rank.
    """
    own = _join_ranks(spec, place, store)
    host: Any
    if own.games is not None:
        host = start_sampling(own, own.games)
    else:
        host = start_proposing(own) if is_base else start_scoring(own)
    rank: Samples = wrap_host(host if place.rank == 0 else FollowingHost(host))
    return rank


def _join_ranks(spec: HostSpec, place: RankPlace, store: Any) -> HostSpec:
    """Make this process a rank of a host; what it has to load.

    Args:
        spec: of the host.
        place: which rank this is.
        store: where it is the rank that opened the group's store.

    Raises:
        ConfigurationError: the ranks would not be where the configuration says.
    """
    device = pick_device(spec.device)
    if device.type == "cpu" and torch.cuda.is_available():
        raise ConfigurationError(
            f"{spec.title}: tensor_parallel with device: cpu needs a process that sees no GPU; set "
            "CUDA_VISIBLE_DEVICES to nothing"
        )
    if device.type == "cuda" and torch.cuda.device_count() <= place.device_index:
        raise ConfigurationError(
            f"{spec.title}: rank {place.rank} of tensor_parallel: {place.size} has no GPU of its own; this process "
            f"sees {torch.cuda.device_count()}"
        )
    if num_ranks() == 1:  # else it is one already, which loads another host
        join(place, device.type, store)
    return replace(spec, device="cpu" if device.type == "cpu" else f"cuda:{place.device_index}")


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
