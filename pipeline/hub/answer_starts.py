"""Where a tokenizer of SentencePiece's kind puts a space of its own: before a text, and not behind a prompt.

Such a tokenizer reads "Hi" as the token of " Hi" where a text begins. Behind a line break it reads "Hi". An answer
stands behind a prompt, so what its chat template writes before answers decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.hub.chat_templates import ANSWER_PROBE, USER_PROBE, PromptTemplate
from pipeline.hub.template_limits import limited

NEWLINE = "\n"


def without_start(before: Sequence[int], ids: Sequence[int]) -> list[int] | None:
    """What follows `before` in some tokens; None where they do not begin with it."""
    return list(ids[len(before) :]) if list(ids[: len(before)]) == list(before) else None


def answers_follow_directly(tokenizer: Any, template: PromptTemplate, weights: Mapping[str, float]) -> bool:
    """Whether a template has answers begin without the space that the tokenizer puts before a text.

    Args:
        tokenizer: of the model, as transformers has it.
        template: that writes its prompts.
        weights: by principal, which the template may read.
    """
    begun = _ids(tokenizer, ANSWER_PROBE)
    inside = without_start(_ids(tokenizer, NEWLINE), _ids(tokenizer, NEWLINE + ANSWER_PROBE))
    if template.text is None or inside is None or inside == begun:
        return False
    question = {"role": "user", "content": USER_PROBE}
    answer = {"role": "assistant", "content": ANSWER_PROBE}

    def render(*messages: Mapping[str, str]) -> str:
        return limited(
            lambda: str(
                tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=template.text,
                    tokenize=False,
                    add_generation_prompt=len(messages) == 1,
                    **{"principle": "", "weights": dict(weights), **template.variables},
                )
            )
        )

    try:
        prompt = render(question)
    except Exception:  # a template is a program: this one cannot write that, and nothing is known of it
        return False
    try:
        whole = render(question, answer)
    except Exception:
        whole = ""
    # where a template writes no answers, or other ones, an answer is put behind the prompt as it is
    if not whole.startswith(prompt):
        whole = prompt + ANSWER_PROBE
    behind = without_start(_ids(tokenizer, prompt), _ids(tokenizer, whole))
    # the last token may go on in what follows the answer
    return behind is not None and not _holds(behind, begun[:-1] or begun) and _holds(behind, inside[:-1] or inside)


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(ids[at : at + len(part)]) == list(part) for at in range(len(ids)))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
