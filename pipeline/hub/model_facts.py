"""What a model's config.json says, read without importing transformers.

Planning a run, and refusing one, needs a dozen numbers of every model. transformers' `AutoConfig` gives them after
seconds of imports; for the common families this module reads them from config.json itself. It does so only where the
file states everything that the answer depends on: a family, or a missing key, that it does not know goes to
`AutoConfig`, so the answer is always the one that `AutoConfig` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.hub.sources import ModelSource
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json

GPT2_NAMES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}


@dataclass(frozen=True, slots=True)
class Family:
    """What a family's configuration class makes of keys that a file leaves out.

    Attributes:
        has_kv_heads: it has a default for the number of key-value heads; otherwise that is the number of heads.
        has_head_dim: it has a default for the size of a head; otherwise that is the width over the heads.
        has_end: it has a default for the end token; otherwise there is none.
        names: keys that the family spells in its own way.
        mlp_sizes: keys of its feed-forward layers that have defaults of the family's own.
    """

    has_kv_heads: bool = False
    has_head_dim: bool = False
    has_end: bool = True
    names: Mapping[str, str] = field(default_factory=dict)
    mlp_sizes: tuple[str, ...] = ("intermediate_size",)


EXPERTS = ("moe_intermediate_size", "num_experts_per_tok")
FAMILIES: Mapping[str, Family] = {
    "cohere": Family(),
    "gemma": Family(has_kv_heads=True, has_head_dim=True),
    "gemma2": Family(has_kv_heads=True, has_head_dim=True),
    "gemma3_text": Family(has_kv_heads=True, has_head_dim=True),
    "gpt2": Family(names=GPT2_NAMES, mlp_sizes=()),
    "gpt_neox": Family(),
    "gptj": Family(names=GPT2_NAMES, mlp_sizes=()),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(has_kv_heads=True),
    "mixtral": Family(has_kv_heads=True, mlp_sizes=("intermediate_size", "num_experts_per_tok")),
    "olmo2": Family(),
    "opt": Family(mlp_sizes=("ffn_dim",)),
    "phi": Family(),
    "phi3": Family(),
    "qwen2": Family(has_kv_heads=True, has_end=False),
    "qwen2_moe": Family(
        has_kv_heads=True,
        has_end=False,
        mlp_sizes=("intermediate_size", "shared_expert_intermediate_size", *EXPERTS),
    ),
    "qwen3": Family(has_kv_heads=True, has_head_dim=True, has_end=False),
    "qwen3_moe": Family(has_kv_heads=True, has_end=False, mlp_sizes=("intermediate_size", *EXPERTS)),
    "smollm3": Family(has_kv_heads=True),
    "stablelm": Family(has_kv_heads=True),
    "starcoder2": Family(has_kv_heads=True),
}
COMPOSITES = frozenset({"gemma3"})  # multimodal models, whose language model is under text_config


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The configuration of a model, as far as a run is planned with it. Picklable.

    Attributes:
        model_type: transformers' name of the family, such as "llama".
        architectures: class names, the first one the model's own; may be empty.
        num_layers, num_heads, num_kv_heads, head_dim: None where the model states no attention heads or no layers.
        vocab_size: rows of the embedding, which may be more than the tokenizer has.
        context_length: most tokens of a sequence; None where none is stated.
        eos_token_ids: ids that end a sequence.
        label_names: the names of a sequence classifier's outputs by index; two of them where nothing is stated.
        hidden_size: width of a hidden state; None where none is stated.
        mlp_size: width inside the feed-forward layers, of experts that of all that a token goes through; four times
            `hidden_size` where none is stated.
    """

    model_type: str
    architectures: tuple[str, ...]
    num_layers: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    vocab_size: int
    context_length: int | None
    eos_token_ids: frozenset[int]
    label_names: Mapping[int, str]
    hidden_size: int | None = None
    mlp_size: int | None = None

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    @property
    def attention_size(self) -> int:
        """Numbers of one token's queries, keys and values in one layer; 0 without attention."""
        return ((self.num_heads or 0) + 2 * (self.num_kv_heads or 0)) * (self.head_dim or 0)


def read_model_facts(source: ModelSource) -> ModelFacts:
    """The facts of a resolved model. Raises ConfigurationError where its configuration cannot be read."""
    tree = read_json(LocalTree(Path(source.path)), CONFIG)
    has_own_code = source.trust_remote_code and "auto_map" in tree
    stated = None if has_own_code else _stated_facts(tree)
    return stated if stated is not None else facts_of_config(load_model_config(source), source.name)


def states_everything(source: ModelSource) -> bool:
    """Whether config.json alone states the facts of a model: it is of a common family, whose layers only attend."""
    return _stated_facts(read_json(LocalTree(Path(source.path)), CONFIG)) is not None


def facts_of_config(config: Any, name: str) -> ModelFacts:
    """The facts that a transformers configuration holds. Raises ConfigurationError where it is no language model."""
    try:
        text = text_config(config)
    except ValueError as error:  # several language models in one
        raise ConfigurationError(f"{name} ({config.model_type}) cannot be used: {reason_of(error)}") from error
    vocab_size = stated(text, "vocab_size")
    if not isinstance(vocab_size, int):
        raise ConfigurationError(
            f"{name} ({config.model_type}) has no vocabulary; a decoder-only transformer is needed"
        )
    heads, width, layers = (stated(text, key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    kv_heads, head_dim = stated(text, "num_key_value_heads"), stated(text, "head_dim")
    if isinstance(heads, int) and isinstance(width, int) and isinstance(layers, int):
        kv_heads, head_dim = kv_heads or heads, head_dim or width // heads
    else:
        layers = heads = kv_heads = head_dim = None
    return ModelFacts(
        model_type=config.model_type,
        architectures=tuple(getattr(config, "architectures", None) or ()),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        context_length=context_length(config),
        eos_token_ids=as_ids(stated(text, "eos_token_id")),
        label_names={int(index): str(label) for index, label in config.id2label.items()},
        hidden_size=width if _is_count(width) else None,
        mlp_size=_mlp_size(lambda key: stated(text, key), width) if _is_count(width) else None,
    )


def stated(config: Any, name: str) -> Any:
    """A configuration's value; None where it has none, or one for each layer, which transformers refuses to give."""
    try:
        return getattr(config, name, None)
    except Exception as error:
        if type(error).__name__ != "AmbiguousGlobalPerLayerAttributeError":
            raise
        return None


def load_model_config(source: ModelSource) -> Any:
    """The transformers configuration of a resolved model. Raises ConfigurationError where it cannot be read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # takes seconds

    try:
        return AutoConfig.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, StrictDataclassError) as error:
        raise ConfigurationError(f"the configuration of {source.name} cannot be read: {reason_of(error)}") from error


def context_length(config: Any) -> int | None:
    """Most tokens that a sequence may have, as a transformers configuration states it; None where it states none."""
    length = getattr(text_config(config), "max_position_embeddings", None)
    return length if _is_count(length) else None


def text_config(config: Any) -> Any:
    """The language model's part of a transformers configuration, of a multimodal model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def as_mapping(config: Any) -> Mapping[str, Any]:
    """The text part of a transformers configuration, with the defaults of its class."""
    text = text_config(config)
    # some classes compute these, and do not write them
    computed = {name: stated(text, name) for name in ("layer_types", "layers_block_type")}
    return {**text.to_dict(), **{name: value for name, value in computed.items() if value is not None}}


def reason_of(error: Exception) -> str:
    """Why transformers would not read a model, in one line."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    if "trust_remote_code" in message:
        return "it brings Python code of its own; set trust_remote_code: true if you trust that code"
    return message[:300]


def as_ids(stated: int | Iterable[int] | None) -> frozenset[int]:
    """Token ids that a configuration states as one, several or none."""
    if stated is None:
        return frozenset()
    return frozenset([stated] if isinstance(stated, int) else stated)


def _stated_facts(tree: Mapping[str, Any]) -> ModelFacts | None:
    """The facts, where config.json states everything that they depend on; None where a class would decide."""
    model_type = tree.get("model_type")
    text: Any = tree.get("text_config") if model_type in COMPOSITES else tree
    family = FAMILIES.get(str(text.get("model_type"))) if isinstance(text, dict) else None
    if family is None or "text_config" in text:
        return None
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")
    sizes = {name: _value(text, family, name) for name in names}
    labels, architectures = _labels(tree), tree.get("architectures") or []
    states_end = _is_end(text["eos_token_id"]) if "eos_token_id" in text else not family.has_end
    given = (*sizes.values(), *(text.get(name) for name in family.mlp_sizes))
    if not (states_end and labels is not None and all(_is_count(size) for size in given)):
        return None
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads, head_dim = text.get("num_key_value_heads"), text.get("head_dim")
    if kv_heads is None and not family.has_kv_heads:
        kv_heads = heads
    if head_dim is None and not family.has_head_dim:
        head_dim = width // heads
    # a width that the heads do not divide is refused by some classes
    if not (_is_count(kv_heads) and _is_count(head_dim) and width % heads == 0 and isinstance(architectures, list)):
        return None
    return ModelFacts(
        model_type=str(model_type),
        architectures=tuple(architectures),
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=sizes["vocab_size"],
        context_length=sizes["max_position_embeddings"],
        eos_token_ids=as_ids(text.get("eos_token_id")),
        label_names=labels,
        hidden_size=width,
        mlp_size=_mlp_size(text.get, width),
    )


def _mlp_size(value_of: Callable[[str], Any], hidden_size: int) -> int:
    """The width inside the feed-forward layers, by the names that families have for it."""
    dense = next(
        (value for key in ("intermediate_size", "ffn_dim", "n_inner") if _is_count(value := value_of(key))), 0
    )
    of_expert = value_of("moe_intermediate_size")
    num_experts = value_of("num_experts_per_tok")
    if not _is_count(num_experts):
        return dense or 4 * hidden_size
    of_expert = of_expert if _is_count(of_expert) else dense
    shared = value_of("shared_expert_intermediate_size")
    return max(dense, num_experts * of_expert + (shared if _is_count(shared) else 0)) or 4 * hidden_size


def _value(text: Mapping[str, Any], family: Family, name: str) -> Any:
    """The value under the name that the family's files use; None where both names are there, which is ambiguous."""
    own = family.names.get(name, name)
    return None if own != name and name in text else text.get(own)


def _labels(tree: Mapping[str, Any]) -> dict[int, str] | None:
    """The names of a classifier's outputs; None where the file contradicts itself."""
    names, number = tree.get("id2label"), tree.get("num_labels")
    if names is None:
        number = 2 if number is None else number
        return {index: f"LABEL_{index}" for index in range(number)} if _is_count(number) else None
    if not isinstance(names, Mapping) or (number is not None and number != len(names)):
        return None
    try:
        return {int(index): str(label) for index, label in names.items()}
    except ValueError:
        return None


def _is_end(stated: Any) -> bool:
    ids = stated if isinstance(stated, list) else [stated]
    return stated is None or all(isinstance(each, int) and not isinstance(each, bool) for each in ids)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
