"""Score conversations with a sequence-classification model of transformers.

B texts of a batch, T tokens, D the width of the hidden states, L outputs of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.conversations import JudgedConversations
from pipeline.evaluation.judges.interface import JudgedAnswer
from pipeline.hub.sources import ModelSource, fetch_weights
from pipeline.hub.tokenizer_facts import load_tokenizer
from pipeline.sections import ModelConfig
from pipeline.worker.loading import pick_device, pick_dtype
from pipeline.worker.weights import read_with_report


@dataclass(frozen=True, slots=True)
class SequenceClassifier:
    """A reward model on its device, with its tokenizer.

    Scores are pooled by the attention mask, at each text's last token. transformers pools by token id instead: where
    the padding token also ends a text, as it often does, that reads the token before the last.

    Args:
        model: a sequence-classification model in evaluation mode.
        pad_id: any token id; padding is masked.
        conversations: encodes them.
        label: which of the model's outputs is the score.
        factor: what the output is multiplied by.
        batch_size: most texts per forward pass; a text's score does not depend on it, up to rounding.
        max_tokens: longest text in tokens; None for no limit.
    """

    model: Any
    pad_id: int
    conversations: JudgedConversations
    label: int
    factor: float
    batch_size: int
    max_tokens: int | None

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """One score per answer; NaN for a text that is longer than `max_tokens`, or that the template refuses."""
        encoded = [self.conversations.encode(answer) for answer in answers]
        scores = [math.nan] * len(answers)
        todo = [at for at, ids in enumerate(encoded) if ids and len(ids) <= (self.max_tokens or math.inf)]
        todo.sort(key=lambda at: len(encoded[at]))  # texts of similar length share a batch, which saves padding
        for start in range(0, len(todo), self.batch_size):
            batch = todo[start : start + self.batch_size]
            for at, found in zip(batch, self._score_batch([encoded[at] for at in batch]), strict=True):
                scores[at] = found * self.factor
        return scores

    @torch.inference_mode()
    def _score_batch(self, encoded: Sequence[Sequence[int]]) -> list[float]:
        device = self.model.device
        longest = max(map(len, encoded))
        fill = self.pad_id
        ids_BT = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in encoded], device=device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded], device=device)
        logits_BL = self._logits(ids_BT, mask_BT)
        return [float(value) for value in logits_BL[:, self.label].float()]

    def _logits(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        head = getattr(self.model, "score", None)
        if head is None:  # an encoder: it pools its first token, so padding on the right does not matter
            logits_BL: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
            return logits_BL
        body = getattr(self.model, self.model.base_model_prefix)
        states_BTD = body(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        last_B = mask_BT.sum(1) - 1
        pooled_BL: Tensor = head(states_BTD[torch.arange(len(last_B), device=last_B.device), last_B])
        return pooled_BL


def load_classifier(name: str, source: ModelSource, cache_folder: Path, placement: ModelConfig) -> tuple[Any, Any]:
    """The model on its device, and its tokenizer.

    Args:
        name: the judge's name, for error messages.
        source: the resolved model.
        cache_folder: where downloaded weights are kept.
        placement: its device and dtype.

    Raises:
        ConfigurationError: the model cannot be loaded, or has no trained head.
    """
    device = pick_device(placement.device)
    folder = fetch_weights(source, cache_folder=cache_folder)
    model, found = read_with_report(
        f"judge {name}: {source.name}",
        AutoModelForSequenceClassification,
        folder,
        dtype=pick_dtype(placement.dtype, device),
        trust_remote_code=source.trust_remote_code,
    )
    if found["mismatched_keys"]:
        other = ", ".join(sorted(name for name, *_ in found["mismatched_keys"])[:3])
        raise ConfigurationError(f"judge {name}: {source.name} has weights of another shape than it says: {other}")
    if found["missing_keys"]:
        # transformers fills a missing head with random numbers, and every score would be noise
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise ConfigurationError(f"judge {name}: {source.name} has no weights for {missing}; it is no reward model")
    return model.to(device).eval().requires_grad_(False), load_tokenizer(source)
