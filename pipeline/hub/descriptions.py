"""What a model will take, read from its configuration and headers, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.hub.families import is_served, keeps_states
from pipeline.hub.model_facts import as_mapping, load_model_config, read_model_facts, states_everything
from pipeline.hub.sources import ModelSource

BYTES_BY_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8.0),
    **dict.fromkeys(("F32", "I32", "U32"), 4.0),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2.0),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1.0),
    "F4": 0.5,
}
CONVERTED = ("F64", "F32", "F16", "BF16")  # these are loaded in the configured dtype, others as they are stored


def stored_bytes(num_parameters_by_dtype: Mapping[str, int]) -> int:
    """Bytes of weights in files, from the number of parameters by safetensors' dtype names."""
    return int(sum(count * STORED_BYTES.get(dtype, 4.0) for dtype, count in num_parameters_by_dtype.items()))


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Sizes of a model. Of attention with a window or a compressed cache, the KV cache is an upper bound.

    Models without attention have no layers of it, and no heads.
    """

    architecture: str
    num_parameters: int
    num_parameters_by_dtype: Mapping[str, int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    context_length: int | None
    vocab_size: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights in the files."""
        return stored_bytes(self.num_parameters_by_dtype)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights once loaded as "float32", "bfloat16" or "float16"."""
        counts = self.num_parameters_by_dtype
        return int(
            sum(
                count * (BYTES_BY_DTYPE[dtype] if stored in CONVERTED else STORED_BYTES.get(stored, 4.0))
                for stored, count in counts.items()
            )
        )

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that one token of one row takes in the KV cache: keys and values of every layer."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * BYTES_BY_DTYPE[dtype]


def describe_model(source: ModelSource) -> ModelDescription:
    """Describe a resolved model. Raises ConfigurationError where its configuration lacks what is needed."""
    facts = read_model_facts(source)
    if facts.num_kv_heads is None and is_served(facts.model_type):
        facts = replace(facts, num_layers=0, num_kv_heads=0, head_dim=0)
    if facts.num_layers is None or facts.num_kv_heads is None or facts.head_dim is None:
        raise ConfigurationError(
            f"{source.name} ({facts.model_type}) does not state layers and attention heads; a decoder-only "
            f"transformer is needed"
        )
    counts = source.num_parameters_by_dtype
    return ModelDescription(
        architecture=(facts.architectures or (facts.model_type,))[0],
        num_parameters=sum(counts.values()),
        num_parameters_by_dtype=dict(counts),
        num_layers=facts.num_layers,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        context_length=facts.context_length,
        vocab_size=facts.vocab_size,
    )


def recurrent_config(source: ModelSource) -> Any:
    """The transformers configuration of a resolved model whose rows have states; None of another model.

    Code that a model brings is not run: whether such a model keeps states is seen when it is loaded.
    """
    if source.trust_remote_code or states_everything(source):
        return None
    config = load_model_config(source)
    return config if keeps_states(as_mapping(config)) else None
