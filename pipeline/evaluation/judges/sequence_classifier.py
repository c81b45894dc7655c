"""Score conversations with a reward model: transformers' sequence classifiers, and heads of other makes.

B texts of a batch, T tokens, D the width of the hidden states, L outputs of the model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import RowError
from pipeline.evaluation.judges.conversations import JudgedConversations
from pipeline.evaluation.judges.interface import JudgedAnswer, NoScore
from pipeline.hub.model_facts import context_length
from pipeline.hub.sources import ModelSource, fetch_weights
from pipeline.hub.tokenizer_facts import load_tokenizer
from pipeline.sections import ModelConfig
from pipeline.worker.devices import pick_device, pick_dtype
from pipeline.worker.quantised import quantised_options
from pipeline.worker.scoring_models import ScoringModel, load_scoring_model


@dataclass(frozen=True, slots=True)
class SequenceClassifier:
    """A reward model on its device, with its tokenizer.

    Scores are pooled by the attention mask, at each text's last token. transformers pools by token id instead: where
    the padding token also ends a text, as it often does, that reads the token before the last. Encoders, which have
    no head that scores each token, pool as their own class does.

    Args:
        found: the model, its backbone and its head.
        pad_id: any token id; padding is masked.
        conversations: encodes them.
        label: which of the model's outputs is the score.
        factor: what the output is multiplied by.
        batch_size: most texts per forward pass; a text's score does not depend on it, up to rounding.
        max_tokens: longest text in tokens; None for no limit.
        end_id: the token at which a text is scored, added where it does not end with it; None: its own last token.
    """

    found: ScoringModel
    pad_id: int
    conversations: JudgedConversations
    label: int
    factor: float
    batch_size: int
    max_tokens: int | None
    end_id: int | None = None

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """One score per answer; none for a text that is longer than `max_tokens`, or that the template refuses."""
        encoded = [self._encode(answer) for answer in answers]
        scores: list[float] = [
            NoScore(ids) if isinstance(ids, str) else NoScore(f"the text has {len(ids)} tokens, too many")
            for ids in encoded
        ]
        lists = [[] if isinstance(ids, str) else ids for ids in encoded]
        todo = [at for at, ids in enumerate(lists) if ids and len(ids) <= (self.max_tokens or math.inf)]
        todo.sort(key=lambda at: len(lists[at]))  # texts of similar length share a batch, which saves padding
        for start in range(0, len(todo), self.batch_size):
            batch = todo[start : start + self.batch_size]
            segments = [self._segments(answers[at], lists[at]) for at in batch]
            for at, found in zip(batch, self._score_batch([lists[at] for at in batch], segments), strict=True):
                scores[at] = found * self.factor
        return scores

    @torch.inference_mode()
    def _score_batch(self, encoded: Sequence[Sequence[int]], segments: Sequence[Sequence[int]]) -> list[float]:
        device = next(self.found.model.parameters()).device
        longest = max(map(len, encoded))
        fill = self.pad_id
        ids_BT = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in encoded], device=device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded], device=device)
        rows = [[*each, *[0] * (longest - len(each))] for each in segments]
        logits_BL = self._logits(ids_BT, mask_BT, torch.tensor(rows, device=device))
        return [float(value) for value in logits_BL[:, self.label].float()]

    def _logits(self, ids_BT: Tensor, mask_BT: Tensor, segments_BT: Tensor) -> Tensor:
        head = self.found.head
        if head is None:  # an encoder: it pools its first token, so padding on the right does not matter
            marked = {"token_type_ids": segments_BT} if bool(segments_BT.any()) else {}
            logits_BL: Tensor = self.found.model(input_ids=ids_BT, attention_mask=mask_BT, **marked).logits
            return logits_BL
        states_BTD = self.found.backbone(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        last_B = mask_BT.sum(1) - 1
        pooled_BL: Tensor = head(states_BTD[torch.arange(len(last_B), device=last_B.device), last_B])
        return pooled_BL

    def _segments(self, answer: JudgedAnswer, ids: Sequence[int]) -> list[int]:
        """Of each token 0 or 1, for an encoder that tells prompt and answer apart by them; all 0 for other models."""
        model = self.found.model
        num_known = getattr(model.config, "type_vocab_size", None)  # some that know them do not state a number
        is_known = num_known is None or num_known > 1
        if self.found.head is not None or not is_known or "token_type_ids" not in _inputs_of(model):
            return [0] * len(ids)
        return self.conversations.segments(answer) or [0] * len(ids)

    def _encode(self, answer: JudgedAnswer) -> list[int] | str:
        """Token ids of conversation and answer. Where there are none, why: then the answer has no score."""
        try:
            ids = self.conversations.encode(answer)
        except RowError as error:
            return str(error)
        if ids and self.end_id is not None and ids[-1] != self.end_id:
            ids = [*ids, self.end_id]
        return ids or "the chat template gives it no text"


def longest_text(model: Any) -> int | None:
    """Most tokens of a text; None where the model states none. Positions of RoBERTa's kind begin behind padding's."""
    length = context_length(model.config)
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return length if length is None or padding is None else length - padding - 1


def _inputs_of(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def load_judge_model(
    name: str, source: ModelSource, cache_folder: Path, placement: ModelConfig
) -> tuple[ScoringModel, Any]:
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
    dtype = pick_dtype(placement.dtype, device)
    options = quantised_options(source, device, dtype)
    found = load_scoring_model(
        f"judge {name}: {source.name}",
        fetch_weights(source, cache_folder=cache_folder),
        dtype=dtype,
        trust_remote_code=source.trust_remote_code,
        options=options,
    )
    found.model.to(device).eval().requires_grad_(False)
    if found.head is not None:
        found.head.to(device)
    return found, load_tokenizer(source)
