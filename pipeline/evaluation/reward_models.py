"""Reward models: sequence-classification models that score a conversation with its answer.

B texts of a batch, T tokens, L outputs of the model.
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
from pipeline.evaluation.judge_config import RewardModelJudge
from pipeline.evaluation.judges import Answer, factor_of
from pipeline.hub.descriptions import load_model_config
from pipeline.hub.sources import ModelSource, fetch_weights
from pipeline.hub.tokenizers import context_length, load_tokenizer, reason_of
from pipeline.worker.loading import pick_device, pick_dtype


def check_reward_model(name: str, config: RewardModelJudge, source: ModelSource) -> None:
    """Refuse a model without scores by its configuration. Raises ConfigurationError."""
    model_config = load_model_config(source)
    architectures = [str(each) for each in model_config.architectures or []]
    if not any(each.endswith(("ForSequenceClassification", "RewardModel")) for each in architectures):
        raise ConfigurationError(
            f"judge {name}: {source.name} is {', '.join(architectures) or 'of no stated architecture'}; "
            "a reward model is a sequence-classification model"
        )
    if config.label >= model_config.num_labels:
        raise ConfigurationError(
            f"judge {name}: label must be below {model_config.num_labels}, the number of outputs of {source.name}; "
            f"got {config.label}"
        )


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model on a device.

    The score is pooled by the attention mask, at each text's last token: where the padding token is also the one
    that ends a text, as often, pooling by token id would read the token before.
    """

    model: Any
    tokenizer: Any
    config: RewardModelJudge
    max_tokens: int | None

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """A score each; NaN for a text that is longer than the model's context, or that its template refuses."""
        encoded = [self._encode(answer) for answer in answers]
        scores = [math.nan] * len(answers)
        todo = [at for at, ids in enumerate(encoded) if ids and len(ids) <= (self.max_tokens or math.inf)]
        todo.sort(key=lambda at: len(encoded[at]))  # texts of like length share a batch: little padding
        for start in range(0, len(todo), self.config.batch_size):
            batch = todo[start : start + self.config.batch_size]
            for at, found in zip(batch, self._score_batch([encoded[at] for at in batch]), strict=True):
                scores[at] = found * factor_of(self.config)
        return scores

    @torch.inference_mode()
    def _score_batch(self, encoded: Sequence[Sequence[int]]) -> list[float]:
        device = self.model.device
        longest = max(map(len, encoded))
        fill = self.tokenizer.pad_token_id or 0
        ids_BT = torch.tensor([[*ids, *[fill] * (longest - len(ids))] for ids in encoded], device=device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in encoded], device=device)
        logits_BL = self._logits(ids_BT, mask_BT)
        return [float(value) for value in logits_BL[:, self.config.label].float()]

    def _logits(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        head = getattr(self.model, "score", None)
        if head is None:  # an encoder: it pools its first token, whatever the padding
            logits_BL: Tensor = self.model(input_ids=ids_BT, attention_mask=mask_BT).logits
            return logits_BL
        body = getattr(self.model, self.model.base_model_prefix)
        states_BTD = body(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        last_B = mask_BT.sum(1) - 1
        pooled_BL: Tensor = head(states_BTD[torch.arange(len(last_B), device=last_B.device), last_B])
        return pooled_BL

    def _encode(self, answer: Answer) -> list[int]:
        """Token ids of conversation and answer: by the chat template, or else as a pair of plain texts."""
        template = self.config.chat_template or self.tokenizer.chat_template
        if template is None:
            prompt = "\n\n".join(str(message["content"]) for message in answer.prompt)
            return list(self.tokenizer(prompt, answer.text)["input_ids"])
        messages = [*answer.prompt, {"role": "assistant", "content": answer.text}]
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # Jinja runs the template's own code: such an answer has no score
            return []
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def load_reward_model(name: str, config: RewardModelJudge, source: ModelSource, cache_folder: Path) -> RewardModel:
    """Load the weights onto the judge's device.

    Raises:
        ConfigurationError: it cannot be loaded, or has no trained head.
    """
    device = pick_device(config.model.device)
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            fetch_weights(source, cache_folder=cache_folder),
            dtype=pick_dtype(config.model.dtype, device),
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigurationError(f"judge {name}: {source.name} cannot be loaded: {reason_of(error)}") from error
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise ConfigurationError(f"judge {name}: {source.name} has no weights for {missing}; it is no reward model")
    tokenizer = load_tokenizer(source)
    limits = [limit for limit in (config.max_tokens, context_length(model.config)) if limit is not None]
    return RewardModel(model.to(device).eval().requires_grad_(False), tokenizer, config, min(limits, default=None))
