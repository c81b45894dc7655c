"""How many parameters a model has, and how many of them a quantiser takes: counted without weights."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import load_model_config, reason_of
from pipeline.hub.sources import ModelSource
from pipeline.sections import ModelSizes


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of a model.

    Args:
        total: all of them.
        in_linears: of the linear layers that are quantised while weights are loaded; the head is not.
        largest: of the largest of these layers.
    """

    total: int
    in_linears: int
    largest: int


def count_parameters(source: ModelSource) -> ParameterCounts:
    """Count the parameters of a resolved model from its configuration, by making it without numbers.

    Raises:
        ConfigurationError: transformers cannot make it.
    """
    import torch  # with transformers it takes seconds
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    config = load_model_config(source)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
        kept = get_keys_to_not_convert(model)
    except Exception as error:  # whatever the model raises
        raise ConfigurationError(f"the parameters of {source.name} cannot be counted: {reason_of(error)}") from error
    sizes = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(name == key or name.startswith(f"{key}.") for key in kept)
    ]
    return ParameterCounts(sum(each.numel() for each in model.parameters()), sum(sizes), max(sizes, default=0))


def count_stated(sizes: ModelSizes) -> ParameterCounts:
    """The parameters of a decoder of stated sizes: four projections of attention, three of a gated feed-forward
    layer and two norms in each layer, the embedding, a last norm and the head."""
    width = sizes.hidden_size
    keys = width * (sizes.kv_heads or sizes.heads) // sizes.heads
    of_layer = 2 * width * width + 2 * width * keys + 3 * width * sizes.intermediate_size
    linears = sizes.layers * of_layer
    embeddings = (1 if sizes.is_tied else 2) * sizes.vocab_size * width
    norms = (2 * sizes.layers + 1) * width
    return ParameterCounts(linears + embeddings + norms, linears, width * max(width, sizes.intermediate_size))
