"""Measures a trained adapter on pairs that were held out. Importing this takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.training.checks import PairScore, accuracy, pick_examples, summarise
from pipeline.training.data import EncodedPair
from pipeline.training.settings import Loss
from pipeline.training.trainers import answer_logprobs, as_dataset, make_collator

if TYPE_CHECKING:
    from pipeline.training.fit import Task


def measure(task: Task, trainer: Any, objective: str) -> dict[str, Any]:
    """What the adapter is worth for an objective, one that depends on a preference vector at the unit vector.

    `other_vectors` then has the accuracy at the unit vectors of the other objectives: what the vector changes.
    """
    training = task.training
    pairs = [pair for pair in task.held_out if objective in pair.comparison.labels]
    is_policy, per_token = training.loss is Loss.DPO, training.length_normalization

    def score(vector_of: str) -> list[PairScore]:
        vector = None
        if task.form is not None:
            vector = [float(name == vector_of) for name in task.objectives]
        return score_pairs(trainer, pairs, objective, training.device_batch_size, vector)

    def margins(scores: Sequence[PairScore]) -> list[float]:
        used = [score.per_token() for score in scores] if per_token else scores
        return [score.margin_to_backbone if is_policy else score.margin for score in used]

    scores = score(objective)
    summary = summarise(scores, beta=training.effective_beta, is_policy=is_policy, per_token=per_token)
    summary["examples"] = pick_examples(pairs, margins(scores), objective)
    if task.form is not None:
        others = {name: score(name) for name in task.objectives if name != objective}
        summary["other_vectors"] = {
            name: {
                "none": accuracy([each.margin for each in found]),
                "backbone": accuracy([each.margin_to_backbone for each in found]),
            }
            for name, found in others.items()
        }
    return summary


@torch.no_grad()
def score_pairs(
    trainer: Any, pairs: Sequence[EncodedPair], objective: str, at_once: int, vector: Sequence[float] | None
) -> list[PairScore]:
    """The log-likelihoods of pairs under the trained model, and under its backbone.

    `vector` is the preference vector of an adapter that depends on one.
    """
    model = trainer.model.eval()
    dataset, collate = as_dataset(pairs, objective), make_collator(trainer.data_collator.pad_token_id)
    scores: list[PairScore] = []
    for start in range(0, len(pairs), at_once):
        batch = collate([dataset[at] for at in range(start, min(start + at_once, len(pairs)))])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        if vector is not None:
            trainer.vectors.of_sequences = torch.tensor([vector] * len(batch["input_ids"]), device=model.device)
        with trainer.accelerator.autocast():
            logprobs, num_tokens = answer_logprobs(model, batch)
            with model.disable_adapter():
                before, _ = answer_logprobs(model, batch)
        halves = [each.tolist() for tensor in (logprobs, before, num_tokens) for each in tensor.chunk(2)]
        scores += [PairScore(*each) for each in zip(*halves, strict=True)]
    return scores
