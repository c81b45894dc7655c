"""TRL's trainer with the losses of principals. Importing this takes seconds.

B pairs of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pipeline.training.data import EncodedPair


def as_dataset(pairs: Sequence[EncodedPair], objective: str) -> Dataset:
    """The pairs as the trainer reads them: token ids, the better answer first."""
    rows = []
    for pair in pairs:
        better = pair.comparison.labels[objective]
        chosen, rejected = pair.answer_ids[better], pair.answer_ids[1 - better]
        rows.append({"prompt_ids": pair.prompt_ids, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


def make_collator(pad_token_id: int) -> Any:
    """Pads pairs; the first half of a batch is the better answers, the second half the worse ones."""
    return DataCollatorForPreference(pad_token_id=pad_token_id)


def answer_logprobs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The log-likelihood of every answer of a batch [2B] in nats, and its number of tokens [2B]."""
    mask = inputs["completion_mask"]
    output = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
        labels=inputs["input_ids"].masked_fill(mask == 0, -100),
        fused_lm_head=True,  # TRL's: log-probabilities without all logits in memory
    )
    return output.log_probs.sum(1), mask[:, 1:].sum(1)


class PolicyTrainer(DPOTrainer):  # type: ignore[misc]
    """DPO on pairs that are token ids already, encoded as a run encodes them."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Checkpoints need no card."""

    def log_metric(self, name: str, values: Tensor) -> None:
        """Add the mean of some values of the batch to the log."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(values.detach()).float().mean().item())


class ArmTrainer(PolicyTrainer):
    """Trains an autoregressive reward model: -log sigmoid(beta (log p(better) - log p(worse))), without a reference.

    The loss is GenARM's (Xu et al., 2025, equation 5).

    Args:
        length_normalization: whether log-likelihoods are means over tokens, not sums.
        options: of TRL's `DPOTrainer`.
    """

    def __init__(self, *, length_normalization: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._length_normalization = length_normalization

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        better_B, worse_B = self.rewards(model, inputs).chunk(2)
        margins_B = self.beta * (better_B - worse_B)
        self.log_metric("rewards/margins", margins_B)
        self.log_metric("rewards/accuracies", (margins_B > 0).float())
        return -logsigmoid(margins_B).mean()

    def rewards(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The reward of every answer of a batch, [2B]."""
        logprobs, num_tokens = answer_logprobs(model, inputs)
        return logprobs / num_tokens if self._length_normalization else logprobs
