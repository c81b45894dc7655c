"""The heads of reward models and value functions: what a checkpoint's weights are called, and what they mean.

transformers' own sequence classifiers have `score.weight`. Others are read here: safe-rlhf's `score_head`, TRL's
`v_head.summary`, a regression layer with several outputs as ArmoRM has, and `value_head.safetensors` beside a model
or an adapter. No weights are loaded: names and shapes are in the headers of the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.hub.sources import ModelSource
from pipeline.hub.weight_files import CONFIG, VALUE_HEAD, LocalTree, find_model_files, read_json, shapes_in

CLASSIFIER = "ForSequenceClassification"
# names before ".weight" and ".bias", or before the numbers of layers; a longer one comes before what it begins with
HEADS = (
    "score", "score_head", "v_head.summary", "v_head", "value_head.summary", "value_head", "reward_head", "rm_head",
    "regression_layer", "regression_head",
)  # fmt: skip
# of a causal LM beside a value head, of safe-rlhf's normalizer, and of ArmoRM's gate over its outputs: not needed
BESIDE = re.compile(r"(lm_head|embed_out|output)\.(weight|bias)|normalizer\..*|gating\..*|reward_transform_matrix")
NORMALIZERS = {"reward": "affine", "cost": "scale", "critic": "identity"}  # safe-rlhf's, by score_type
ARMORM = (
    "helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity",
    "helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness", "beavertails-is_safe",
    "prometheus-score", "argilla-overall_quality", "argilla-judge_lm", "code-complexity", "code-style",
    "code-explanation", "code-instruction-following", "code-readability",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer of a head, by the names of its weights.

    Args:
        weight: of [outputs, inputs].
        bias: None where it has none.
        num_inputs: columns of the weight.
        num_outputs: rows of the weight.
    """

    weight: str
    bias: str | None
    num_inputs: int
    num_outputs: int


@dataclass(frozen=True, slots=True)
class HeadFacts:
    """A head as its files describe it.

    Args:
        file: the file beside the weights that holds it; None: the model's own weights.
        layers: one, or several with ReLU between them.
        names: of the outputs, by number.
        ends: whether it was trained at the end of a text: safe-rlhf's are.
        normalizer: how safe-rlhf's normalizer changes a score: affine, scale or identity.
        mean: of the normalizer, where the configuration states it.
        var: likewise.
    """

    file: str | None
    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    ends: bool = False
    normalizer: str = "identity"
    mean: tuple[float, ...] | None = None
    var: tuple[float, ...] | None = None

    @property
    def weights(self) -> frozenset[str]:
        """The names of its weights."""
        return frozenset(name for layer in self.layers for name in (layer.weight, layer.bias) if name is not None)


def read_head(source: ModelSource) -> HeadFacts | None:
    """The head of a resolved model whose weights are on this machine; None where they are not, or it has none.

    Raises:
        ConfigurationError: it has several, or one whose shapes do not fit.
    """
    folder = Path(source.path)
    tree = LocalTree(folder)
    try:
        files = find_model_files(tree).weights
    except ConfigurationError:
        return None
    if any(name not in tree.sizes for name in files):
        return None
    return find_head(folder, source.name)


def find_head(folder: Path, name: str) -> HeadFacts | None:
    """The head of a model's files; None where they hold none.

    Raises:
        ConfigurationError: they hold several, or one whose shapes do not fit.
    """
    tree = LocalTree(folder)
    config = read_json(tree, CONFIG)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in find_model_files(tree).weights:
        shapes |= shapes_in(folder / file)
    found = _layers(shapes, name)
    if found:
        _check_place(config, name)
    if VALUE_HEAD in tree.sizes:
        if found:
            raise ConfigurationError(f"{name} has {VALUE_HEAD} beside {found[0].weight} in its own weights; keep one")
        return find_value_head(folder, name, width=hidden_size(config))
    if not found:
        return None
    if len(found) > 1 and not _states_relu(config):
        raise ConfigurationError(
            f"{name}: its head has {len(found)} layers ({found[0].weight} and so on), and its configuration does not "
            "say what is between them"
        )
    check_layers(found, hidden_size(config), name)
    ends = any(str(each).endswith("ForScore") for each in config.get("architectures") or ())
    return HeadFacts(
        None,
        found,
        _names(config, found[-1].num_outputs),
        ends,
        NORMALIZERS.get(str(config.get("score_type")), "affine") if config.get("do_normalize") else "identity",
        _numbers(config.get("mean")),
        _numbers(config.get("var")),
    )


def find_value_head(folder: Path, name: str, *, width: int | None) -> HeadFacts | None:
    """The head in a folder's `value_head.safetensors`; None where there is no such file.

    Raises:
        ConfigurationError: the file holds no linear layer, or one of another width.
    """
    if not (folder / VALUE_HEAD).is_file():
        return None
    title = f"{name}/{VALUE_HEAD}"
    shapes = shapes_in(folder / VALUE_HEAD)
    found = _layers({key if "." in key else f"score.{key}": shape for key, shape in shapes.items()}, title)
    if len(found) != 1:
        raise ConfigurationError(
            f"{title} must hold one linear layer, weight [1, {width or 'hidden'}] and bias [1]; it holds "
            f"{', '.join(f'{key} {list(shape)}' for key, shape in shapes.items()) or 'nothing'}"
        )
    [layer] = found
    if layer.weight not in shapes:  # the file names it without a prefix
        bias = None if layer.bias is None else "bias"
        layer = Layer("weight", bias, layer.num_inputs, layer.num_outputs)
    check_layers((layer,), width, title)
    return HeadFacts(VALUE_HEAD, (layer,), _names({}, layer.num_outputs))


def _check_place(config: Mapping[str, Any], name: str) -> None:
    """Refuse a model that gives its scores at tokens of its own. Raises ConfigurationError."""
    if (token := config.get("reward_token_id")) is not None:
        raise ConfigurationError(
            f"{name} gives its score at a token of its own behind the text (reward_token_id: {token}), where it is "
            "not read; its output elsewhere means nothing"
        )
    if any("ProcessRewardModel" in str(each) for each in config.get("architectures") or ()):
        raise ConfigurationError(
            f"{name} is a process reward model: it scores steps at marks between them, where it is not read"
        )


def check_layers(layers: Sequence[Layer], width: int | None, name: str) -> None:
    """Refuse a head whose shapes do not fit. Raises ConfigurationError, which names the weight."""
    for layer in layers:
        if width is not None and layer.num_inputs != width:
            raise ConfigurationError(
                f"{name}: the head {layer.weight} [{layer.num_outputs}, {layer.num_inputs}] does not fit: it must "
                f"have {width} columns"
            )
        width = layer.num_outputs


def choose_output(label: int | str | None, names: Sequence[str], place: str) -> int:
    """The number of the output that counts.

    Args:
        label: as configured.
        names: of the outputs.
        place: of the principal or the judge, for messages.

    Raises:
        ConfigurationError: there are several and none is named, or there is none such.
    """
    listed = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
    if label is None:
        if len(names) > 1:
            raise ConfigurationError(f"{place}.label is missing: the model has {len(names)} outputs, {listed}")
        return 0
    if isinstance(label, str):
        if names.count(label) != 1:
            raise ConfigurationError(f"{place}.label must be one of {listed}; got {label!r}")
        return names.index(label)
    if label >= len(names):
        raise ConfigurationError(f"{place}.label must be one of {listed}; got {label}")
    return label


def output_names(count: int) -> tuple[str, ...]:
    """What the outputs of a head are called whose files have no names for them."""
    return ("score",) if count == 1 else tuple(f"LABEL_{index}" for index in range(count))


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """The width of a model's hidden states; None where its config.json does not state it."""
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(text, Mapping)
    keys = ("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")
    return next((value for key in keys if isinstance(value := text.get(key), int)), None)


def _layers(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[Layer, ...]:
    """The layers of the only head among some weights; none where there is no head.

    Raises:
        ConfigurationError: there are several heads, or one is no linear layer.
    """
    found: dict[str, list[str]] = {}
    for prefix in HEADS:
        single = [prefix] if f"{prefix}.weight" in shapes else []
        numbered = [key for key in shapes if re.fullmatch(rf"{re.escape(prefix)}\.\d+\.weight", key)]
        layers = [key.removesuffix(".weight") for key in numbered]
        if paths := [*single, *sorted(layers, key=lambda path: int(path.rpartition(".")[2]))]:
            found[prefix] = paths
    if len(found) > 1:
        raise ConfigurationError(f"{name} has several heads, {', '.join(found)}; keep the one that is meant")
    return tuple(_layer(path, shapes, name) for paths in found.values() for path in paths)


def _layer(path: str, shapes: Mapping[str, tuple[int, ...]], name: str) -> Layer:
    shape, bias = shapes[f"{path}.weight"], f"{path}.bias"
    if len(shape) != 2:
        raise ConfigurationError(
            f"{name}: the head {path}.weight {list(shape)} does not fit: it must have two dimensions"
        )
    if bias in shapes and shapes[bias] != shape[:1]:
        raise ConfigurationError(
            f"{name}: the head {bias} {list(shapes[bias])} does not fit: it must be [{shape[0]}]"
        )
    return Layer(f"{path}.weight", bias if bias in shapes else None, shape[1], shape[0])


def _states_relu(config: Mapping[str, Any]) -> bool:
    """Whether a head of several layers is known to have ReLU between them."""
    return "Qwen2ForRewardModel" in (config.get("architectures") or ()) or config.get("vhead_layer_type") == "mlp"


def _names(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names of a head's outputs."""
    stated = config.get("id2label")
    if isinstance(stated, Mapping) and len(stated) == count:
        names = [str(stated.get(str(index), index)) for index in range(count)]
        if not all(re.fullmatch(r"LABEL_\d+", each) for each in names):
            return tuple(names)
    if any("RewardModelWithGating" in str(each) for each in config.get("architectures") or ()) and count == len(
        ARMORM
    ):
        return ARMORM
    return (str(config["score_type"]),) if count == 1 and "score_type" in config else output_names(count)


def _numbers(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (float(value),)
    return tuple(map(float, value)) if isinstance(value, list) else None
