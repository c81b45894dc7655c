"""Conversations as a judge's model reads them: by the rules of a run's prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.engine.placement import place
from pipeline.engine.special_text import TextEncoder
from pipeline.errors import RowError
from pipeline.evaluation.judges.interface import JudgedAnswer
from pipeline.hub.chat_templates import PromptTemplate
from pipeline.hub.template_limits import limited
from pipeline.inputs.conversations import read_conversation


@dataclass(frozen=True, slots=True)
class JudgedConversations:
    """Encodes a prompt with its answer, to the end of the turn.

    A system message that the template does not write goes into the first user message, special tokens that messages
    spell stay text, and the time is the stated one, as in the prompts of a run.

    Args:
        tokenizer: of transformers.
        template: how conversations are written; without text, prompt and answer are read as a pair of plain texts.
        special_tokens: tokens that are no text, as text.
        end_id: the token that the template writes after an answer; None where it writes none.
    """

    tokenizer: Any
    template: PromptTemplate
    special_tokens: frozenset[str]
    end_id: int | None

    def encode(self, answer: JudgedAnswer) -> list[int]:
        """Token ids. Raises RowError where the template refuses the conversation, which then has no score."""
        if self.template.text is None:
            return list(self._pair(answer)["input_ids"])
        encoder = TextEncoder(self.tokenizer, self.special_tokens)
        try:
            prompt_messages = read_conversation(list(answer.prompt), "prompt") if answer.prompt else ()
            messages = place([*prompt_messages, {"role": "assistant", "content": answer.text}], None, self.template)
            text = limited(
                lambda: self.tokenizer.apply_chat_template(
                    encoder.mark(messages),
                    chat_template=self.template.text,
                    tokenize=False,
                    **self.template.variables,
                )
            )
            ids = encoder.encode_marked(text)
        except RowError:
            raise
        except Exception as error:  # whatever the template's own code raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise RowError(f"the chat template refuses it ({reason})") from error
        return self._to_the_end(ids)

    def segments(self, answer: JudgedAnswer) -> list[int]:
        """Of each token, whether it is of the prompt (0) or of the answer (1); empty where a tokenizer says nothing.

        BERT and other encoders were trained on pairs that are marked so.
        """
        return list(self._pair(answer).get("token_type_ids", ())) if self.template.text is None else []

    def _pair(self, answer: JudgedAnswer) -> Any:
        prompt = "\n\n".join(str(message["content"]) for message in answer.prompt)
        return self.tokenizer(prompt, answer.text, split_special_tokens=True)

    def _to_the_end(self, ids: list[int]) -> list[int]:
        """Without what the template writes behind the end of the turn, such as a line break: nobody draws it."""
        if self.end_id is None or self.end_id not in ids:
            return ids
        behind = ids[::-1].index(self.end_id)
        rest = self.tokenizer.decode(ids[len(ids) - behind :], skip_special_tokens=True) if behind else ""
        return ids if rest.strip() else ids[: len(ids) - behind]
