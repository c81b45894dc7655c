"""Whether the tokens of a run are drafted, as far as its configuration and its models' files show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.hub.families import PLAIN, Expected, keeps_states
from pipeline.hub.sources import ModelSource
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json
from pipeline.protocol.topology import HostPlan, Topology


def why_not_drafted(
    config: Config, topology: Topology, sources: Mapping[str, ModelSource], expected: Mapping[str, Expected]
) -> tuple[str, ...]:
    """What keeps passes from verifying proposed tokens; empty where nothing does.

    Args:
        config: of the run.
        topology: its hosts.
        sources: their models, by host name.
        expected: how each is decoded, by host name.

    Raises:
        ConfigurationError: `decoding.draft` names sources, and they would have no effect.
    """
    if not (wanted := config.draft_sources):
        return config.undrafted
    reasons = tuple(
        f"{plan.name} ({', '.join(plan.serves)}) {reason}"
        for plan in topology.hosts
        if (reason := _why_not_verified(plan, sources[plan.name], expected.get(plan.name)))
    )
    if reasons and config.decoding.draft != "auto":
        raise ConfigurationError(
            f"decoding.draft: [{', '.join(wanted)}] has no effect: {'; '.join(reasons)}; leave it out, or say off"
        )
    return reasons


def _why_not_verified(plan: HostPlan, source: ModelSource, expected: Expected | None) -> str | None:
    """Why a host reads one token of a row in a pass; None where its device decides."""
    if plan.is_reward_model:
        return "scores candidates after the text of each row, and a pass has one such text"
    if plan.reads_text:
        return "reads text by tokens of its own, one step at a time"
    if expected is not None and expected.decoding == PLAIN:
        return "is decoded one row at a time"
    config = read_json(LocalTree(Path(source.path)), CONFIG)
    text = config.get("text_config")
    if keeps_states(text if isinstance(text, Mapping) else config):
        return "keeps states that a rejected token would have changed"
    if plan.model.device.startswith("cuda"):
        return "is on a GPU, where passes have fixed shapes with one token for each row"
    return None
