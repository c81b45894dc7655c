"""Whether a model can be split over ranks or spread over devices: what its family's tiny model showed, and its sizes.

Nothing here imports torch or transformers: a model that cannot be split is refused while a run is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from pipeline.hub.families import REFUSED, family_named

TRANSFORMERS = (5, 23)  # the first version whose plans are measured; older ones split experts in other ways
NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# sizes that plans split, as configurations name them: parts of a head or of a gate would give wrong numbers
SPLIT_SIZES = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_global_key_value_heads",
    "swa_num_attention_heads",
    "swa_num_key_value_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "dense_intermediate_size",
    *NUMBERS_OF_EXPERTS,
)
INSTEAD = "use pipeline_parallel: N, which spreads whole layers over N GPUs"
ONE_DEVICE = "use a device that holds it, with tensor_parallel: 1 and pipeline_parallel: 1"


def number_of_experts(config: Mapping[str, Any]) -> int | None:
    """The experts of each layer that a configuration names; None where it is no mixture of experts.

    Args:
        config: the contents of config.json, or transformers' configuration as a mapping, of the text part.
    """
    return next((config[name] for name in NUMBERS_OF_EXPERTS if isinstance(config.get(name), int)), None) or None


def why_not_tensor_parallel(config: Mapping[str, Any], num_ranks: int) -> str | None:
    """Why a model with this config.json cannot be split over so many ranks; None: it can.

    Args:
        config: the contents of config.json.
        num_ranks: of the group.
    """
    if (version := _transformers()) < TRANSFORMERS:
        found, needed = (".".join(map(str, each)) for each in (version, TRANSFORMERS))
        return f"tensor_parallel needs transformers {needed} or later, and {found} is installed"
    if "auto_map" in config:
        return f"it has Python code of its own, whose layers no plan splits; {INSTEAD}"
    if config.get("quantization_config"):
        return f"its weights are quantised, and quantised weights are not split; {ONE_DEVICE}"
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    model_type = config.get("model_type")
    family = family_named(model_type) or family_named(text.get("model_type"))
    if family is None:
        return f"`cage models` does not know its family, {model_type}; {INSTEAD}"
    if family.decoding == REFUSED:
        return None  # by its own reason
    if not family.is_tensor_parallel:
        instead = INSTEAD if family.is_pipeline_parallel else ONE_DEVICE
        return f"{family.reasons['tensor_parallel']}; {instead}"
    return why_not_divided(text, num_ranks)


def why_not_pipeline_parallel(config: Mapping[str, Any], num_layers: int | None, num_devices: int) -> str | None:
    """Why the layers of a model with this config.json cannot be spread over so many devices; None: they can, or it is
    tried when it is loaded, as families are that the table does not have.

    Args:
        config: the contents of config.json.
        num_layers: of its text part; None where they are not known.
        num_devices: of the process.
    """
    if config.get("quantization_config"):
        return f"its weights are quantised, and quantised weights are not spread; {ONE_DEVICE}"
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    family = family_named(config.get("model_type")) or family_named(text.get("model_type"))
    if family is not None and "auto_map" not in config:
        if family.decoding == REFUSED:
            return None  # by its own reason
        if not family.is_pipeline_parallel:
            return f"{family.reasons['pipeline_parallel']}; {ONE_DEVICE}"
    return why_too_few_layers(num_layers, num_devices)


def why_too_few_layers(num_layers: int | None, num_devices: int) -> str | None:
    """Why so many devices would not each have a layer; None: they have, or the layers are not known."""
    if num_layers is None or num_devices <= num_layers:
        return None
    return (
        f"it has {num_layers} layers, and each device has at least one; use pipeline_parallel: {num_layers} or less"
    )


def why_not_divided(text: Mapping[str, Any], num_ranks: int) -> str | None:
    """Which size of a model cannot be divided by the number of ranks; None: all can.

    Args:
        text: the configuration of the text part.
        num_ranks: of the group.
    """
    for name in SPLIT_SIZES:
        stated = text.get(name)
        for size in stated if isinstance(stated, list) else [stated]:
            if isinstance(size, int) and size % num_ranks:
                return f"its {name}, {size}, cannot be divided by tensor_parallel: {num_ranks}; {INSTEAD}"
    return None


def _transformers() -> tuple[int, ...]:
    return tuple(int(each) for each in metadata.version("transformers").split(".")[:2])
