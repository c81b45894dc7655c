"""Trains adapters that depend on a preference vector (PBLoRA, of PARM). Importing this takes seconds.

dW(p) = s (B1 W1 A1 + B2 W2(p) A2), as `pipeline.hub.preference_adapters` says. peft's LoRA gives A and B; what it
calls A is replaced by A followed by the middle matrices, which read each sequence's own vector.

N sequences of a pass (better or first answers, then the others), T tokens, B pairs, K objectives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pipeline.hub.preference_adapters import PEFT_TYPE, PreferenceForm
from pipeline.hub.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.training.data import EncodedPair
from pipeline.training.trainers import ArmTrainer

LABELS = "labels_of_objectives"
ADAPTER = "default"  # peft's name of the adapter


class Vectors:
    """The preference vectors of the running pass.

    Attributes:
        of_sequences: [N, K]; set before each pass.
    """

    def __init__(self) -> None:
        self.of_sequences = torch.empty(0)


class PreferenceDown(nn.Module):
    """A projection down, and the middle matrices.

    Args:
        down: peft's projection, [r1 + r2, inputs].
        form: the sizes.
        vectors: of the running pass.
    """

    def __init__(self, down: nn.Linear, form: PreferenceForm, vectors: Vectors) -> None:
        super().__init__()
        first, rank, weight = form.fixed_rank, form.rank, down.weight
        self.weight = weight
        self.w1 = nn.Parameter(weight.new_empty(first, first))
        self.w2 = nn.Parameter(weight.new_empty(len(form.objectives), rank**2))
        for middle in (self.w1, self.w2):
            nn.init.kaiming_uniform_(middle, a=math.sqrt(5))
        self._form, self._vectors = form, vectors

    def forward(self, states: Tensor) -> Tensor:
        """[N, T, r1 + r2] of states [N, T, inputs]."""
        low_NTR = linear(states, self.weight)
        first, rank = self._form.fixed_rank, self._form.rank
        vectors_NK = self._vectors.of_sequences.to(self.w2)
        middle_NRR = (vectors_NK @ self.w2).view(-1, rank, rank).to(low_NTR)
        fixed = linear(low_NTR[..., :first], self.w1.to(low_NTR))
        return torch.cat([fixed, low_NTR[..., first:] @ middle_NRR.transpose(1, 2)], -1)


def depend_on_preference(model: Any, form: PreferenceForm) -> Vectors:
    """Make a LoRA adapter of rank r1 + r2 depend on preference vectors; what they are read from."""
    from peft.tuners.lora.layer import LoraLayer

    vectors = Vectors()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A[ADAPTER] = PreferenceDown(module.lora_A[ADAPTER], form, vectors)
            module.scaling[ADAPTER] = form.scaling
    return vectors


def as_labelled_dataset(pairs: Sequence[EncodedPair], objectives: Sequence[str]) -> Dataset:
    """Pairs with a label for each objective: 1 where the first answer is better, -1 where the second, 0 for none."""
    rows = []
    for pair in pairs:
        labels = [
            0 if (better := pair.comparison.labels.get(name)) is None else 1 - 2 * better for name in objectives
        ]
        first, second = pair.answer_ids
        rows.append({"prompt_ids": pair.prompt_ids, "chosen_ids": first, "rejected_ids": second, LABELS: labels})
    return Dataset.from_list(rows)


class LabelledCollator(DataCollatorForPreference):  # type: ignore[misc]
    """Pads pairs and keeps their labels, [B, K]."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        return {**batch, LABELS: torch.tensor([example[LABELS] for example in examples], dtype=torch.float)}


class PreferenceArmTrainer(ArmTrainer):
    """Trains one reward model for all objectives: each pair draws a vector, which also weighs the objectives' losses.

    The loss is PARM's, with a vector for each pair in place of one for each batch.

    Args:
        form: the adapter's.
        concentration: of the Dirichlet distribution of the vectors.
        options: of `ArmTrainer`.
    """

    def __init__(self, *, form: PreferenceForm, concentration: float, **options: Any) -> None:
        super().__init__(**options)
        self._form = form
        self.vectors = depend_on_preference(self.model, form)
        self._concentration = concentration

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        labels_BK = inputs[LABELS]
        vectors_BK = self._draw(len(labels_BK)).to(labels_BK)
        self.vectors.of_sequences = vectors_BK.repeat(2, 1)
        first_B, second_B = self.rewards(model, inputs).chunk(2)
        margins_BK = self.beta * (first_B - second_B)[:, None] * labels_BK
        counts_BK = labels_BK.abs()
        weights_BK = vectors_BK * counts_BK
        losses_B = (-logsigmoid(margins_BK) * weights_BK).sum(1)
        main_B = weights_BK.argmax(1, keepdim=True)  # the objective that the pair's vector is closest to
        self.log_metric("rewards/accuracies", (margins_BK.gather(1, main_B) > 0).float())
        return losses_B.mean()

    def _draw(self, count: int) -> Tensor:
        """Preference vectors, by the generator whose state checkpoints keep."""
        parameters = torch.full((len(self._form.objectives),), self._concentration)
        return torch.distributions.Dirichlet(parameters).sample((count,))


def save_preference_adapter(model: Any, form: PreferenceForm, folder: Path, backbone: str) -> None:
    """Write an adapter in the layout of PARM's, with the names of its objectives.

    Args:
        model: peft's, as `depend_on_preference` left it.
        form: the adapter's.
        folder: made for it.
        backbone: the name of the model that it was trained on.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreferenceDown):
            place = name.removesuffix(f".lora_A.{ADAPTER}")
            up = model.get_submodule(f"{place}.lora_B.{ADAPTER}").weight
            parts = {"A": module.weight, "B": up, "W1": module.w1, "W2": module.w2}
            tensors |= {f"{place}.pblora_{part}": each.detach().cpu().contiguous() for part, each in parts.items()}
    config = model.peft_config[ADAPTER]
    stated = {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "r1": form.fixed_rank,
        "r2": form.rank,
        "obj_num": len(form.objectives),
        "objectives": list(form.objectives),
        "lora_alpha": form.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(config.target_modules),
        "fan_in_fan_out": bool(config.fan_in_fan_out),
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
