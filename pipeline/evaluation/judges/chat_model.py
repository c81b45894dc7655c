"""A chat model of this machine as a judge: its probabilities of the allowed numbers after the rubric.

S allowed numbers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipeline.engine.special_text import TextEncoder
from pipeline.errors import ConfigurationError, RowError
from pipeline.evaluation.judges.interface import JudgeContext, JudgedAnswer, NoScore
from pipeline.hub.model_facts import context_length
from pipeline.hub.template_limits import limited
from pipeline.hub.tokenizer_facts import facts_of_tokenizer, load_tokenizer
from pipeline.protocol.specs import HostSpec
from pipeline.sections import ModelConfig
from pipeline.worker.devices import pick_device, pick_dtype
from pipeline.worker.weights import load_causal_lm

if TYPE_CHECKING:
    from pipeline.evaluation.judges.llm import LlmJudge


@dataclass(frozen=True, slots=True)
class ChatJudge:
    """Scores answers by a chat model's probabilities of the allowed numbers.

    Args:
        model: a causal LM in eval mode.
        tokenizer: its tokenizer, with a chat template.
        judge: the section.
        max_tokens: the model's context; None: no limit.
        special_tokens: tokens that stay text where a conversation or an answer spells them.
    """

    model: Any
    tokenizer: Any
    judge: LlmJudge
    max_tokens: int | None
    special_tokens: frozenset[str] = frozenset()

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """One score per answer; none where the text does not fit or the template refuses it."""
        return [self._score(answer) for answer in answers]

    def _score(self, answer: JudgedAnswer) -> float:
        encoder = TextEncoder(self.tokenizer, self.special_tokens)
        text = self._prompt(answer, encoder)
        if isinstance(text, NoScore):
            return text
        try:
            ids = encoder.encode_marked(text)
        except RowError as error:
            return NoScore(str(error))
        numbers = range(self.judge.low, self.judge.high + 1)
        written = [list(self.tokenizer(str(each), add_special_tokens=False)["input_ids"]) for each in numbers]
        longest = len(ids) + max(map(len, written))
        if self.max_tokens is not None and longest > self.max_tokens:
            return NoScore(f"the text has {longest} tokens, too many")
        logprobs_S = torch.tensor(self._logprobs(ids, written), dtype=torch.float64)
        if not bool(torch.isfinite(logprobs_S).all()):
            return NoScore("the model's probabilities are not finite")
        if self.judge.reads == "likeliest":
            found = float(numbers[int(logprobs_S.argmax())])
        else:
            found = float((logprobs_S.softmax(-1) * torch.tensor(list(numbers), dtype=torch.float64)).sum())
        return found * self.judge.factor

    def _prompt(self, answer: JudgedAnswer, encoder: TextEncoder) -> str | NoScore:
        """The marked text to go on with; the instructions are the user's where system messages get lost."""
        system, user = encoder.mark(self.judge.messages(answer))
        joined = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
        reason = "it leaves out the instructions"
        render = partial(self.tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
        for messages in ([system, user], [joined]):
            try:
                text = limited(partial(render, messages))
            except Exception as error:  # Jinja runs the template's own code
                reason = type(error).__name__
                continue
            if str(system["content"]) in text:
                return text
        return NoScore(f"the chat template refuses it ({reason})")

    @torch.inference_mode()
    def _logprobs(self, ids: Sequence[int], written: Sequence[Sequence[int]]) -> list[float]:
        """The log-probability of each number's tokens, and of an end behind it where another one begins with it."""
        device = self.model.device
        known: dict[tuple[int, ...], torch.Tensor] = {}

        def following(before: Sequence[int]) -> torch.Tensor:
            key = tuple(before)
            if key not in known:
                logits_V = self.model(input_ids=torch.tensor([[*ids, *before]], device=device)).logits[0, -1]
                known[key] = logits_V.double().log_softmax(-1).cpu()
            return known[key]

        return [
            sum(float(following(tokens[:at])[token]) for at, token in enumerate(tokens))
            + self._closing(tokens, written, following)
            for tokens in written
        ]

    @staticmethod
    def _closing(tokens: Sequence[int], written: Sequence[Sequence[int]], following: Any) -> float:
        """Of a number that another one begins with: that no token which goes on with it follows, in nats."""
        longer = {each[len(tokens)] for each in written if len(each) > len(tokens) and each[: len(tokens)] == tokens}
        if not longer:
            return 0.0
        going_on = float(following(tokens)[sorted(longer)].exp().sum())
        return float(torch.log1p(torch.tensor(-min(going_on, 1 - 1e-12), dtype=torch.float64)))


def load_chat_judge(context: JudgeContext, judge: LlmJudge, placement: ModelConfig) -> ChatJudge:
    """The judge with its model on its device.

    Raises:
        ConfigurationError: the model cannot be loaded, or has no chat template.
    """
    assert context.source is not None
    device = pick_device(placement.device)
    tokenizer = load_tokenizer(context.source)
    if not tokenizer.chat_template:
        raise ConfigurationError(
            f"judge {context.name}: {context.source.name} has no chat template; it is no chat model"
        )
    spec = HostSpec(
        name=f"judge {context.name}", serves=(f"judge {context.name}",), source=context.source, dtype=placement.dtype,
        device=placement.device, roles=(), num_slots=1, vocab_size=len(tokenizer), strict=False,
        cache_folder=context.cache_folder,
    )  # fmt: skip
    model = load_causal_lm(spec, dtype=pick_dtype(placement.dtype, device), device=device)
    model.to(device).eval().requires_grad_(False)
    special_tokens = frozenset(facts_of_tokenizer(tokenizer).special_tokens)
    return ChatJudge(model, tokenizer, judge, context_length(model.config), special_tokens)
