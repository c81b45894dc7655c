"""Reward models and value functions from their files: a backbone, and the head that makes scores of its states.

transformers' own sequence classifiers are loaded by transformers. Of any other head the backbone is loaded, and the
head is built from the weights that `pipeline.hub.reward_heads` found. Either way every weight comes from the files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.errors import ConfigurationError
from pipeline.hub.reward_heads import BESIDE, CLASSIFIER, HeadFacts, find_head, find_value_head
from pipeline.hub.weight_files import CONFIG, LocalTree, find_model_files, read_json
from pipeline.worker.weights import describe_faults, read_with_report

EPSILON = 1e-8  # which safe-rlhf adds to a standard deviation


@dataclass(frozen=True, slots=True)
class ScoringModel:
    """A model that gives scores.

    Args:
        model: as transformers loads it, in eval mode; on the CPU, quantised ones on their device.
        backbone: the part that gives hidden states.
        head: from hidden states to outputs, in the backbone's dtype; None where only the whole model gives scores
            (encoders), or where adapters bring the heads.
        names: of the outputs.
        ends: whether the head was trained at the end of a text.
        gives_scores: whether the whole model gives scores itself.
    """

    model: Any
    backbone: Any
    head: nn.Module | None
    names: tuple[str, ...]
    ends: bool = False
    gives_scores: bool = False

    def float_head(self) -> Any:
        """The head in float32."""
        assert self.head is not None
        return copy.deepcopy(self.head).float()


def load_scoring_model(
    title: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    takes_adapters: bool = False,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> ScoringModel:
    """Load a model with a head.

    Args:
        title: names the model in messages.
        folder: of its files.
        dtype: of the weights.
        trust_remote_code: whether code of the model's own may run.
        takes_adapters: whether LoRA adapters are added later, which bring heads; then the model itself may have none.
        options: of `from_pretrained`, as `quantised_options` gives them, and those that split the weights over ranks.

    Raises:
        ConfigurationError: it cannot be read, has no head, or one that does not fit, or lacks weights.
    """
    head = find_head(folder, title)
    if not takes_adapters and (head is None or _is_transformers_own(folder, head)):
        return _load_classifier(title, folder, dtype, trust_remote_code, options)
    loader = AutoModelForCausalLM if takes_adapters else AutoModel
    model, report = read_with_report(
        title, loader, folder, dtype=dtype, trust_remote_code=trust_remote_code, **options
    )
    beside = head.weights if head is not None and head.file is None else frozenset()
    unexpected = {name for name in report["unexpected_keys"] if not (name in beside or BESIDE.fullmatch(name))}
    fault = describe_faults({**report, "unexpected_keys": unexpected}, model)
    if fault is not None:
        raise ConfigurationError(f"{title}: {fault}")
    built = None if head is None else build_head(head, folder, title)
    backbone = model.base_model if takes_adapters else model
    return ScoringModel(
        model.eval(),
        backbone,
        None if built is None else built.to(dtype),
        () if head is None else head.names,
        ends=head is not None and head.ends,
    )


def load_value_head(folder: Path, title: str) -> nn.Module:
    """The head beside an adapter, in float32. Raises ConfigurationError where there is none."""
    head = find_value_head(folder, title, width=None)
    if head is None:
        raise ConfigurationError(f"{title} has no value_head.safetensors beside its weights")
    return build_head(head, folder, title)


def build_head(head: HeadFacts, folder: Path, title: str) -> nn.Module:
    """A head from its weights, in float32, with safe-rlhf's normalizer worked into its last layer."""
    files = [head.file] if head.file is not None else find_model_files(LocalTree(folder)).weights
    tensors = _read(folder, files, head.weights | {"normalizer.mean", "normalizer.var"})
    layers: list[nn.Module] = []
    for layer in head.layers:
        linear = nn.Linear(layer.num_inputs, layer.num_outputs, bias=True, dtype=torch.float32)
        with torch.no_grad():
            linear.weight.copy_(tensors[layer.weight].float())
            linear.bias.copy_(torch.zeros(()) if layer.bias is None else tensors[layer.bias].float())
        layers += [*([nn.ReLU()] if layers else []), linear]
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    _normalize(last, head, tensors, title)
    return nn.Sequential(*layers).requires_grad_(False).eval()


def _normalize(last: nn.Linear, head: HeadFacts, tensors: Mapping[str, Tensor], title: str) -> None:
    """Work a normalizer into the last layer: (score - mean) / (std + epsilon), or without the mean."""
    if head.normalizer == "identity":
        return
    mean, var = _statistic(tensors, "mean", head.mean), _statistic(tensors, "var", head.var)
    if mean is None or var is None:
        raise ConfigurationError(f"{title} says do_normalize and has no mean or var of its normalizer")
    if any(len(each) not in (1, last.out_features) for each in (mean, var)) or not bool((var > 0).all()):
        raise ConfigurationError(
            f"{title}: its normalizer needs a mean and a var > 0 of 1 or {last.out_features} numbers; it has mean "
            f"{mean.tolist()} and var {var.tolist()}"
        )
    with torch.no_grad():
        scale = 1 / (var.sqrt() + EPSILON)
        if head.normalizer == "affine":
            last.bias.sub_(mean)
        last.bias.mul_(scale)
        last.weight.mul_(scale[:, None])


def _statistic(tensors: Mapping[str, Tensor], name: str, stated: Sequence[float] | None) -> Tensor | None:
    stored = tensors.get(f"normalizer.{name}")
    if stored is not None:
        return stored.float().reshape(-1)
    return None if stated is None else torch.tensor(stated, dtype=torch.float32)


def _load_classifier(
    title: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool, options: Mapping[str, Any]
) -> ScoringModel:
    """A sequence classifier of transformers' own."""
    architectures = read_json(LocalTree(folder), CONFIG).get("architectures") or []
    if architectures and not any(CLASSIFIER in str(each) or "RewardModel" in str(each) for each in architectures):
        raise ConfigurationError(
            f"{title}: its files hold no head that gives scores, and a {', '.join(map(str, architectures))} is no "
            "sequence classifier"
        )
    model, report = read_with_report(
        title,
        AutoModelForSequenceClassification,
        folder,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        **options,
    )
    fault = describe_faults(report, model)
    if fault is not None:
        raise ConfigurationError(f"{title}: {fault}")
    names = tuple(str(name) for _, name in sorted((int(at), each) for at, each in model.config.id2label.items()))
    return ScoringModel(model.eval(), model.base_model, getattr(model, "score", None), names, gives_scores=True)


def _is_transformers_own(folder: Path, head: HeadFacts) -> bool:
    """Whether transformers' class has this head: `score` without a bias."""
    architectures = read_json(LocalTree(folder), CONFIG).get("architectures") or []
    return any(CLASSIFIER in str(each) for each in architectures) and head.weights == {"score.weight"}


def _read(folder: Path, files: Sequence[str], wanted: frozenset[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys() if key in wanted}  # noqa: SIM118
    return found
