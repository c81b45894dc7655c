"""How a model marks its reasoning: found in its chat template or its tokenizer, or as the configuration says.

Most reasoning models write a block with a start and an end marker before the answer. gpt-oss writes messages in
channels (harmony): analysis, commentary, final.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.hub.tokenizer_facts import TokenizerFacts

# markers whose form does not show what they are; a family's own spelling, looked for in its chat template alone
KNOWN = (
    ("<|channel>thought", "<channel|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("Here is my thought process:", "Here is my response:"),
    ("<|think|>", "<|end|>"),
)
WORDS = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|reflection|scratchpad|cot)"
NAME = rf"(?i:(?:[a-z0-9]+[:_-])?{WORDS})"  # as <seed:think>, <longcat_think>
# how markers that come in pairs are written: the start as a pattern, and both of them around the name found
FORMS = (
    (re.compile(rf"</?({NAME})>"), "<{}>", "</{}>"),
    (re.compile(rf"\[/?({NAME})\]"), "[{}]", "[/{}]"),
    (re.compile(rf"<\|(?:START|END)_({NAME})\|>"), "<|START_{}|>", "<|END_{}|>"),
    (re.compile(rf"<\|(?:start|end)_({NAME})\|>"), "<|start_{}|>", "<|end_{}|>"),
    (re.compile(rf"<\|(?:start|end)_of_({NAME})\|>"), "<|start_of_{}|>", "<|end_of_{}|>"),
    (re.compile(rf"<\|(?:begin|end)_of_({NAME})\|>"), "<|begin_of_{}|>", "<|end_of_{}|>"),
    (re.compile(rf"<\|(?:begin|end)_({NAME})\|>"), "<|begin_{}|>", "<|end_{}|>"),
    (re.compile(rf"<\|({NAME})_(?:start|end)\|>"), "<|{}_start|>", "<|{}_end|>"),
    (re.compile(rf"<\|({NAME})_(?:begin|end)\|>"), "<|{}_begin|>", "<|{}_end|>"),
)
WRAPPERS = (("<answer>", "</answer>"), ("<response>", "</response>"))
CHANNEL, MESSAGE, START, END = "<|channel|>", "<|message|>", "<|start|>", "<|end|>"
ANALYSIS = "analysis"


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """What stands around a model's reasoning, as text.

    Args:
        start: begins the reasoning.
        end: ends it.
        resume: what must follow the end before an answer can begin; empty where nothing must.
        wrapper: what the model writes around its answer, and is no part of it; None where there is nothing.
        has_channels: whether every message has a header that names its channel.
    """

    start: str
    end: str
    resume: str = ""
    wrapper: tuple[str, str] | None = None
    has_channels: bool = False

    def describe(self) -> str:
        """The markers as a user reads them."""
        return f"{self.start} ... {self.end}"

    def split(self, text: str) -> tuple[str | None, str]:
        """The reasoning and the answer in the text of a whole turn; the reasoning is None where there is none.

        A turn without the start marker has its reasoning before the end marker: the prompt may have opened the block.
        """
        if self.has_channels or self.end not in text:
            begun = text.lstrip().startswith(self.start) and not self.has_channels
            return (text.lstrip()[len(self.start) :].strip(), "") if begun else (None, text)
        before, _, after = text.partition(self.end)
        if self.start in before and not before.lstrip().startswith(self.start):
            return None, text  # the answer speaks of a block in its midst
        return before.lstrip().removeprefix(self.start).strip(), self.unwrap(after)

    def unwrap(self, answer: str) -> str:
        """The answer that follows reasoning, without the blank lines before it and without what is written around."""
        answer = re.sub(r"\A(?:[ \t]*\r?\n)+", "", answer)
        if self.wrapper is None or not answer.lstrip().startswith(self.wrapper[0]):
            return answer
        return answer.lstrip()[len(self.wrapper[0]) :].strip().removesuffix(self.wrapper[1]).rstrip()


HARMONY = ReasoningFormat(
    f"{CHANNEL}{ANALYSIS}{MESSAGE}",
    END,
    resume=f"{START}assistant{CHANNEL}final{MESSAGE}",
    has_channels=True,
)


def find_reasoning(template: str | None, tokenizer: TokenizerFacts) -> ReasoningFormat | None:
    """The format that a model reasons in; None where neither template nor tokenizer has markers of one.

    Args:
        template: that conversations are rendered by.
        tokenizer: of the model.
    """
    tokens = {tokenizer.token_by_id[each] for each in tokenizer.added_ids if each in tokenizer.token_by_id}
    text = template or ""
    if CHANNEL in text and MESSAGE in text and {CHANNEL, MESSAGE, END} <= tokens:
        return HARMONY
    written = list(_pairs_in([text]))
    for start, end in KNOWN:
        if start in text and end in text:
            written.append((start, end))
    # a template may name several: a token of its own is what the model was trained to write
    written.sort(key=lambda pair: not tokens.issuperset(pair))
    pairs = written or [pair for pair in _pairs_in(sorted(tokens)) if tokens.issuperset(pair)]
    if not pairs:
        return None
    wrapper = next((each for each in WRAPPERS if each[0] in text and each[1] in text), None)
    return ReasoningFormat(*pairs[0], wrapper=wrapper)


def _pairs_in(texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of markers of which a text has at least one, in the order of the text and each once."""
    found: dict[tuple[str, str], None] = {}
    for text in texts:
        places = [
            (match.start(), (start.format(match[1]), end.format(match[1])))
            for form, start, end in FORMS
            for match in form.finditer(text)
        ]
        found.update(dict.fromkeys(pair for _, pair in sorted(places)))
    yield from found
