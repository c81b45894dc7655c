"""What a model will take, told from its configuration and headers, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from pipeline.errors import ConfigurationError
from pipeline.hub.sources import ModelSource
from pipeline.hub.tokenizers import context_length, reason_of, text_config

BYTES_BY_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8.0),
    **dict.fromkeys(("F32", "I32", "U32"), 4.0),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2.0),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1.0),
    "F4": 0.5,
}
CONVERTED = ("F64", "F32", "F16", "BF16")  # these are loaded in the configured dtype, others as they are stored


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Sizes of a model. Of attention with a window or a compressed cache, the KV cache is an upper bound."""

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
        return int(sum(count * STORED_BYTES.get(dtype, 4.0) for dtype, count in self.num_parameters_by_dtype.items()))

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


def load_model_config(source: ModelSource) -> Any:
    """The transformers configuration of a resolved model. Raises ConfigurationError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigurationError(f"the configuration of {source.name} cannot be read: {reason_of(error)}") from error


def describe_model(source: ModelSource) -> ModelDescription:
    """Describe a resolved model. Raises ConfigurationError where its configuration lacks what is needed."""
    config = load_model_config(source)
    text = text_config(config)
    heads = getattr(text, "num_attention_heads", None)
    hidden = getattr(text, "hidden_size", None)
    num_layers = getattr(text, "num_hidden_layers", None)
    if not (isinstance(heads, int) and isinstance(hidden, int) and isinstance(num_layers, int)):
        raise ConfigurationError(
            f"{source.name} ({config.model_type}) does not state layers and attention heads; a decoder-only "
            f"transformer is needed"
        )
    counts = source.num_parameters_by_dtype
    return ModelDescription(
        architecture=(getattr(config, "architectures", None) or [config.model_type])[0],
        num_parameters=sum(counts.values()),
        num_parameters_by_dtype=dict(counts),
        num_layers=num_layers,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        context_length=context_length(config),
        vocab_size=text.vocab_size,
    )
