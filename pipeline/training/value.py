"""Trains value heads: a linear head on a backbone with a LoRA adapter says what the answer so far will be worth.

At the last token of the prompt and at every token of an answer the head regresses on the answer's return, the score
of the whole. Importing this takes seconds.

N answers of a batch, T tokens, H hidden sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from pipeline.hub.weight_files import ADAPTER_WEIGHTS, VALUE_HEAD
from pipeline.training.checks import accuracy
from pipeline.training.data import EncodedPair

if TYPE_CHECKING:
    from pipeline.training.fit import Task

HEAD = "value_head"  # the module's name; peft saves it with the adapter


@dataclass(frozen=True, slots=True)
class Returns:
    """How returns are scaled for training: (return - mean) / deviation."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Returns:
        """Of the returns that are trained on."""
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
        return cls(mean, deviation or 1.0)


def scored_answers(pairs: Sequence[EncodedPair], objective: str) -> list[tuple[list[int], list[int], float]]:
    """Every answer once: its prompt's token ids, its own, and its return."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[list[int], list[int], float]] = {}
    for pair in pairs:
        for ids, answer in zip(pair.answer_ids, pair.comparison.answers, strict=True):
            if objective in answer.scores:
                key = (tuple(pair.prompt_ids), tuple(ids))
                found.setdefault(key, (pair.prompt_ids, ids, answer.scores[objective]))
    return list(found.values())


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad answers on the right; `targets` [N] and `mask` [N, T], where the head is trained."""
    longest = max(len(row["ids"]) for row in rows)
    ids, attention, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
    for at, row in enumerate(rows):
        length = len(row["ids"])
        ids[at, :length] = torch.tensor(row["ids"])
        attention[at, :length] = 1
        mask[at, row["start"] : length] = 1
    targets = torch.tensor([row["target"] for row in rows], dtype=torch.float)
    return {"input_ids": ids, "attention_mask": attention, "mask": mask, "targets": targets}


class ValueTrainer(Trainer):  # type: ignore[misc]
    """Regresses on returns at every token of an answer; an answer counts the same whatever its length."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Tensor:
        values_NT = values_of(model, inputs)
        mask_NT = inputs["mask"].to(values_NT)
        errors_NT = (values_NT - inputs["targets"][:, None]) ** 2 * mask_NT
        return (errors_NT.sum(1) / mask_NT.sum(1)).mean()


def values_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The head's value [N, T] at every token, in scaled returns."""
    output = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        output_hidden_states=True,
        use_cache=False,
        logits_to_keep=1,
    )
    head = _unwrapped(model).get_base_model().get_submodule(HEAD)
    states_NTH = output.hidden_states[-1].float()
    # mixed precision would give the values the three digits of bfloat16; a run computes heads in float32
    with torch.autocast(states_NTH.device.type, enabled=False):
        values: Tensor = head(states_NTH)[..., 0]
    return values.float()


def make_value_trainer(task: Task, arguments: Any, lora: Any, callbacks: Sequence[Any]) -> ValueTrainer:
    """The trainer of a task's value head, on its scored answers."""
    from peft import get_peft_model
    from transformers import set_seed

    model = task.backbone.load_model()
    set_seed(task.training.seed)
    model.add_module(HEAD, nn.Linear(model.config.get_text_config().hidden_size, 1))
    nn.init.zeros_(model.get_submodule(HEAD).weight)
    nn.init.zeros_(model.get_submodule(HEAD).bias)
    lora.modules_to_save = [HEAD]
    wrapped = get_peft_model(model, lora)
    answers = scored_answers(task.train, task.name)
    returns = Returns.of([each for *_, each in answers])
    trainer = ValueTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=Dataset.from_list([_row(*each, returns) for each in answers]),
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.returns = returns
    return trainer


def _row(prompt_ids: list[int], ids: list[int], value: float, returns: Returns) -> dict[str, Any]:
    scaled = (value - returns.mean) / returns.deviation
    return {"ids": [*prompt_ids, *ids], "start": len(prompt_ids) - 1, "target": scaled}


def save_value_head(trainer: ValueTrainer, folder: Path, describe: Callable[[Path, Mapping[str, Any]], None]) -> None:
    """Write the adapter and, beside it, the head in the units of the returns."""
    model, returns = trainer.model, trainer.returns
    model.save_pretrained(folder, save_embedding_layers=False)
    file = folder / ADAPTER_WEIGHTS
    save_file(
        {key: value for key, value in load_file(file).items() if HEAD not in key}, file, metadata={"format": "pt"}
    )
    describe(folder, {"modules_to_save": None})
    head = model.get_base_model().get_submodule(HEAD).modules_to_save["default"]
    weight, bias = (each.detach().float().cpu() for each in (head.weight, head.bias))
    tensors = {"weight": weight * returns.deviation, "bias": bias * returns.deviation + returns.mean}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / VALUE_HEAD)


@torch.no_grad()
def measure_values(task: Task, trainer: ValueTrainer) -> dict[str, Any]:
    """How well held-out returns are foretold, at the end of answers and on the way, and how pairs are ordered."""
    model, returns = trainer.model.eval(), trainer.returns
    answers = scored_answers(task.held_out, task.name)
    at_start, on_way, at_end = [], [], []
    for start in range(0, len(answers), task.training.device_batch_size):
        rows = [_row(*each, returns) for each in answers[start : start + task.training.device_batch_size]]
        batch = {key: value.to(model.device) for key, value in collate(rows).items()}
        with trainer.accelerator.autocast():
            values_NT = values_of(model, batch) * returns.deviation + returns.mean
        for values_T, row in zip(values_NT.tolist(), rows, strict=True):
            seen = values_T[row["start"] : len(row["ids"])]
            at_start.append(seen[0])
            on_way.append(seen[len(seen) // 2])
            at_end.append(seen[-1])
    known = [value for *_, value in answers]
    value_of = {(tuple(prompt), tuple(ids)): at for (prompt, ids, _), at in zip(answers, at_end, strict=True)}
    margins = []
    for pair in task.held_out:
        better = pair.comparison.labels[task.name]
        keys = [(tuple(pair.prompt_ids), tuple(ids)) for ids in pair.answer_ids]
        if all(key in value_of for key in keys):
            margins.append(value_of[keys[better]] - value_of[keys[1 - better]])
    return {
        "answers": len(answers),
        "pairs": len(margins),
        "accuracy": {"value": accuracy(margins)} if margins else {},
        "explained": {
            "prompt": explained(known, at_start),
            "middle": explained(known, on_way),
            "end": explained(known, at_end),
        },
        "mean_return": sum(known) / len(known),
    }


def explained(known: Sequence[float], foretold: Sequence[float]) -> float:
    """The share of the returns' variance that is explained: 1 - squared error / variance."""
    mean = sum(known) / len(known)
    variance = sum((value - mean) ** 2 for value in known)
    error = sum((value - other) ** 2 for value, other in zip(known, foretold, strict=True))
    return 1 - error / variance if variance else 0.0


def _unwrapped(model: Any) -> Any:
    """The model inside wrappers of distributed training."""
    while hasattr(model, "module"):
        model = model.module
    return model
