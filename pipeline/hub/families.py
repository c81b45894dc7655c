"""The table of model families: which are decoded in slots, which one row at a time, and which are refused.

`cage models --measure` makes it from tiny models of every family; see `jobs/families`. It is read here so that a
family is known before any weights are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("families.json")
# layers that attend to the keys and values of tokens and keep nothing else, by the names in a configuration's
# layer_types; what other layers keep or read is their own, and short probes need not show it
ATTENTION_LAYERS = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe"}  # the last have no keys
)
# layers that keep a state of their row, alone or beside keys and values: linear attention, SSMs, short convolutions
STATE_LAYERS = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba"})
# what decoding row by row costs; measured by `cage bench decode`, see docs/performance.md
ROW_BY_ROW = "about 12 times slower than in slots with 16 slots and three roles on a CPU, and more with more of them"
SLOTS, PLAIN, REFUSED = "slots", "plain", "refused"


@dataclass(frozen=True, slots=True)
class ServedFamily:
    """What a family's tiny model showed.

    Args:
        decoding: "slots": all rows in one pass; "plain": one row at a time; "refused": not at all.
        is_strict: whether its bits were the same alone and beside other rows.
        takes_adapters: whether LoRA of all its linear layers was exact.
        is_reward_model: whether its sequence classifier was exact.
        has_fixed_passes: whether a pass asks nothing of the host, so that a GPU can capture it as a CUDA graph.
        is_tensor_parallel: whether two ranks that share its layers decoded as one process does.
        is_pipeline_parallel: whether two devices with a part of its layers each gave the bits of one.
        reasons: why not, by "decoding" (not in slots), "lora", "reward_model", "tensor_parallel" and
            "pipeline_parallel".
    """

    decoding: str
    is_strict: bool = False
    takes_adapters: bool = False
    is_reward_model: bool = False
    has_fixed_passes: bool = False
    is_tensor_parallel: bool = False
    is_pipeline_parallel: bool = False
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FamilyTable:
    """All families, and the version of transformers that they were measured with."""

    transformers: str
    families: Mapping[str, ServedFamily]


@cache
def read_table() -> FamilyTable:
    """The table of this version."""
    tree = json.loads(TABLE.read_text(encoding="utf-8"))
    return FamilyTable(tree["transformers"], {name: ServedFamily(**row) for name, row in tree["families"].items()})


def write_table(table: FamilyTable) -> None:
    """Replace the table's file; for `cage models --measure`."""
    rows = {name: asdict(family) for name, family in sorted(table.families.items())}
    text = json.dumps({"transformers": table.transformers, "families": rows}, indent=1, sort_keys=True)
    TABLE.write_text(text + "\n", encoding="utf-8")


def family_named(model_type: str | None) -> ServedFamily | None:
    """A family by transformers' name of the model type; None where the table has none."""
    return read_table().families.get(str(model_type))


def is_served(model_type: str) -> bool:
    """Whether the table has a family and it is decoded, in slots or row by row."""
    family = family_named(model_type)
    return family is not None and family.decoding != REFUSED


def why_not_in_slots(config: Mapping[str, Any]) -> str | None:
    """Why a model with this configuration is not decoded in slots, as far as a configuration shows; None: no reason.

    Args:
        config: the contents of config.json, or transformers' configuration as a mapping, of the text part.
    """
    if reason := _why_layers_differ(config, ATTENTION_LAYERS | STATE_LAYERS):
        return reason
    kinds = {str(each.get("rope_type", each.get("type"))) for each in rope_settings(config)}
    if "longrope" in kinds:
        return "longrope takes its frequencies from the longest row of a pass"
    window = config.get("sliding_window")
    if isinstance(window, int) and window < 2 and config.get("use_sliding_window", True):
        return f"transformers' generate reads a sliding_window of {window} in a way of its own"
    # dynamic rope changes its frequencies beyond max_position_embeddings alone, where every row ends
    if "dynamic" in kinds and not isinstance(config.get("max_position_embeddings"), int):
        return "dynamic rope takes its frequencies from the longest row that there ever was"
    return None


def keeps_states(config: Mapping[str, Any]) -> bool:
    """Whether a model has layers that keep a state of their row.

    Args:
        config: likewise.
    """
    return bool(_layer_kinds(config) & STATE_LAYERS)


def why_layers_differ(config: Mapping[str, Any]) -> str | None:
    """Why a model's layers are not what attention over tokens of many rows computes; None: no reason is known.

    Args:
        config: likewise.
    """
    return _why_layers_differ(config, ATTENTION_LAYERS)


def _layer_kinds(config: Mapping[str, Any]) -> set[str]:
    return {str(each) for name in ("layer_types", "layers_block_type") for each in config.get(name) or ()}


def _why_layers_differ(config: Mapping[str, Any], known: frozenset[str]) -> str | None:
    if found := sorted(_layer_kinds(config) - known):
        return f"layers of type {' and '.join(found)} keep more than keys and values, or read them in their own way"
    if config.get("attn_temperature_tuning") and str(config.get("model_type")).startswith("llama4"):
        return "its attention temperature counts places in the pass, not positions in a row"
    return None


def parts_left_out(config: Mapping[str, Any]) -> list[str]:
    """The parts of a checkpoint that see or hear, by their keys in config.json: its text alone is decoded."""
    senses = ("vision", "audio", "vq", "qformer", "perceiver", "adapter")
    return sorted(key for key in config if key.endswith("_config") and any(sense in key for sense in senses))


def rope_settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every setting of rotary positions that a configuration has, of one kind of layers or of several."""
    found = [config[name] for name in ("rope_parameters", "rope_scaling") if isinstance(config.get(name), Mapping)]
    return [*found, *(each for settings in found for each in settings.values() if isinstance(each, Mapping))]


@dataclass(frozen=True, slots=True)
class Expected:
    """How a model will be decoded, as far as its configuration shows.

    Args:
        decoding: "slots", "plain" or "refused"; None: its family is not in the table, and it is tried at load.
        reason: why not in slots; None where there is none.
        left_out: parts of the checkpoint that see or hear, by their keys in config.json; only text is decoded.
    """

    decoding: str | None
    reason: str | None = None
    left_out: tuple[str, ...] = ()


def expect(config: Mapping[str, Any]) -> Expected:
    """How a model with this config.json will be decoded. Models with Python code of their own are tried at load."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    family = family_named(config.get("model_type")) or family_named(text.get("model_type"))
    left_out = tuple(parts_left_out(config))
    if family is None and "auto_map" not in config and config.get("is_encoder_decoder"):
        return Expected(REFUSED, "it is an encoder-decoder, and answers are written by a decoder alone", left_out)
    if family is None or "auto_map" in config:
        return Expected(None, left_out=left_out)
    if family.decoding == SLOTS and (reason := why_not_in_slots(text)) is not None:
        return Expected(PLAIN, reason, left_out)
    return Expected(family.decoding, family.reasons.get("decoding"), left_out)
