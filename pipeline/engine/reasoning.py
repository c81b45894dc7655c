"""Where a row is in its turn: reasoning or answering. Its tokens alone decide it, so a row may begin again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Protocol

from pipeline.hub.reasoning import ANALYSIS, CHANNEL, END, MESSAGE, ReasoningFormat

MARGIN = 8  # tokens beside those of a marker that a search for it reads
OPENING_TOKENS = 64  # of a prompt's end: enough for the markers that open a block


class Phase(Enum):
    """What the next token belongs to: what comes before reasoning or an answer, reasoning, or the answer."""

    OPENING = auto()
    REASONING = auto()
    ANSWER = auto()


class TextOfTokens(Protocol):
    """What reads tokens; `pipeline.engine.prompts.Prompter` does."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def raw_text(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class ReasoningControl:
    """How reasoning is treated in a run.

    Args:
        form: how the base marks it.
        closing: token ids that close the reasoning and begin the answer.
        steers: whether principals take part in it.
        max_tokens: after which it is closed; None: never.
        ends_turns: whether the end marker also ends a turn, when it stands behind an answer.
    """

    form: ReasoningFormat
    closing: tuple[int, ...]
    steers: bool = True
    max_tokens: int | None = None
    ends_turns: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """What a row's tokens say.

    Args:
        reasoning: without markers; None where there is none.
        answer: without markers.
        num_reasoning_tokens: tokens before the answer, markers included.
        is_closed: whether an answer has begun.
        text: all of it, as it was drawn.
    """

    reasoning: str | None
    answer: str
    num_reasoning_tokens: int
    is_closed: bool
    text: str


@dataclass(slots=True)
class ReasoningTrack:
    """Follows one row's turn.

    Args:
        control: of the run.
        reader: reads tokens.
        begun: the phase in which the prompt ends.

    Attributes:
        phase: of the next token.
    """

    control: ReasoningControl
    reader: TextOfTokens
    begun: Phase
    phase: Phase = field(init=False)
    _forced: list[int] = field(init=False)
    _num_inside: int = field(init=False)
    _segment: int = field(init=False)  # first token of what is read now: a message with its header, or the block
    _contents: list[tuple[int, int]] = field(init=False)  # token ranges of messages that have ended, in channels
    _answer: int = field(init=False)  # first token of the answer

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the tokens: the row begins again."""
        self.phase = self.begun
        self._forced, self._contents = [], []
        self._num_inside = self._segment = self._answer = 0

    @property
    def num_closed(self) -> int:
        """After how many tokens reasoning, or a message in a channel, ended last; 0 where none has."""
        if self.control.form.has_channels:
            return self._segment if self._contents and self.phase is Phase.OPENING else 0
        return self._answer

    @property
    def is_steered(self) -> bool:
        """Whether principals take part in drawing the next token.

        A header that names a channel is no answer yet, whichever it will name; the first token of other models may
        be the answer's.
        """
        before = self.phase is Phase.OPENING and self.control.form.has_channels
        return self.control.steers or not (self.phase is Phase.REASONING or before)

    @property
    def is_over(self) -> bool:
        """Whether it is certain that all further tokens are of the answer, and that none is forced."""
        return self.phase is Phase.ANSWER and not self._forced and not self.control.form.has_channels

    def must_wait(self, num_pending: int) -> bool:
        """Whether a step cannot be sent before the pending tokens are known: they may change how it is drawn."""
        if not num_pending:
            return False
        if self._forced or self.phase is Phase.ANSWER:
            return bool(self._forced)
        limit = self.control.max_tokens
        return not self.control.steers or (limit is not None and self._num_inside + num_pending > limit)

    def forced_token(self) -> int | None:
        """The token that takes the place of the drawn one; None where there is none."""
        limit = self.control.max_tokens
        if not self._forced and self.phase is Phase.REASONING and limit is not None and self._num_inside >= limit:
            self._forced = list(self.control.closing)
        return self._forced.pop(0) if self._forced else None

    def advance(self, tokens: Sequence[int]) -> None:
        """Take the newest of a row's tokens."""
        if self.control.form.has_channels:
            self._advance_in_channels(tokens)
        elif self.phase is Phase.OPENING:
            self._open(tokens)
        elif self.phase is Phase.REASONING:
            self._num_inside += 1
            if self._ends_with(tokens, self.control.form.end):
                self.phase, self._answer = Phase.ANSWER, len(tokens)

    def read(self, tokens: Sequence[int]) -> Turn:
        """What the tokens say; the token that ends the turn is not among them."""
        form, text = self.control.form, self.reader.raw_text(tokens)
        if form.has_channels:
            return self._read_channels(tokens, text)
        if self.phase is Phase.REASONING:
            return Turn(text.lstrip().removeprefix(form.start).strip(), "", len(tokens), False, text)
        if self._answer:
            before, _, _ = self.reader.raw_text(tokens[: self._answer]).rpartition(form.end)
            inside = before.lstrip().removeprefix(form.start).strip()
            return Turn(inside, form.unwrap(self.answer_text(tokens)), self._answer, True, text)
        at = self._unopened(tokens, text)  # a block that is closed and was never opened
        if at is not None:
            reasoning, answer = form.split(text)
            return Turn(reasoning, answer, at, True, text)
        return Turn(None, self.reader.decode(tokens), 0, True, text)

    def complete(self, turn: Turn, begun: str, *, in_answers: bool) -> Turn:
        """The turn with the beginning that the input gave; with the reasoning in its answer where it is wanted there.

        Args:
            turn: as `read` gives it.
            begun: the beginning of the assistant's message; empty where the input gave none.
            in_answers: whether the answer is to contain the reasoning.
        """
        form, answer = self.control.form, begun
        reasoning: str | None = turn.reasoning
        if form.start in begun:
            reasoning = form.split(begun + turn.text)[0]
            answer = form.split(begun)[1] if form.end in begun else ""
        if not in_answers:
            return replace(turn, reasoning=reasoning, answer=answer + turn.answer)
        opening = f"{form.start}\n" if self.begun is Phase.REASONING and not begun else begun
        return replace(turn, reasoning=reasoning, answer=opening + turn.text)

    def answer_text(self, tokens: Sequence[int]) -> str:
        """The text of the answer so far; empty before it begins."""
        if self.phase is not Phase.ANSWER:
            return ""
        after = self.reader.decode(tokens[self._answer :])
        if self._answer and not self.control.form.has_channels:
            # the token that ends the marker may have the answer's first characters
            after = self.reader.raw_text(tokens[: self._answer]).rpartition(self.control.form.end)[2] + after
        return after

    def answer_tokens(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens of the answer so far, with the one before it, whose text may reach into it."""
        return tokens[max(0, self._answer - 1) :] if self.phase is Phase.ANSWER else []

    def _open(self, tokens: Sequence[int]) -> None:
        """Whether the turn begins with the start marker, or cannot any more."""
        # a token may end within a character, which is then shown as U+FFFD
        text, start = self.reader.raw_text(tokens).lstrip().rstrip("\ufffd"), self.control.form.start
        if text.startswith(start):
            self.phase = Phase.REASONING
        elif not start.startswith(text):
            self.phase = Phase.ANSWER

    def _advance_in_channels(self, tokens: Sequence[int]) -> None:
        if self.phase is Phase.REASONING:
            self._num_inside += 1
        if self.phase is Phase.OPENING:
            header = self.reader.raw_text(tokens[self._segment :])
            if header.endswith(MESSAGE):
                self.phase = Phase.REASONING if f"{CHANNEL}{ANALYSIS}" in header else Phase.ANSWER
                self._segment = self._answer = len(tokens)
            elif not self._contents and not _may_begin_header(header):
                self.phase = Phase.ANSWER  # plain text without a header
        elif self._ends_with(tokens, END) and not (self.phase is Phase.ANSWER and self.control.ends_turns):
            self._contents.append((self._segment, len(tokens)))
            self.phase, self._segment = Phase.OPENING, len(tokens)

    def _read_channels(self, tokens: Sequence[int], text: str) -> Turn:
        """The last message is the answer, unless it is an analysis; all before it is reasoning."""
        contents = [self.reader.raw_text(tokens[first:last]).removesuffix(END) for first, last in self._contents]
        if self.phase is Phase.REASONING:
            contents.append(self.reader.raw_text(tokens[self._segment :]))
        reasoning = "\n\n".join(each.strip() for each in contents) if contents else None
        if self.phase is Phase.ANSWER:
            return Turn(reasoning, self.answer_text(tokens), self._answer, True, text)
        return Turn(reasoning, "", len(tokens), reasoning is None, text)

    def _ends_with(self, tokens: Sequence[int], marker: str) -> bool:
        """Whether the newest token completes a marker."""
        if marker[-1] not in self.reader.raw_text(tokens[-1:]):
            return False
        reach = len(marker.encode()) + MARGIN
        window, before = self.reader.raw_text(tokens[-reach:]), self.reader.raw_text(tokens[-reach:-1])
        return window.count(marker) > before.count(marker)

    def _unopened(self, tokens: Sequence[int], text: str) -> int | None:
        """How many tokens a block has that is closed and was never opened; None where there is no such block."""
        form = self.control.form
        if form.end not in text or form.split(text)[0] is None:
            return None
        return next(count for count in range(1, len(tokens) + 1) if form.end in self.reader.raw_text(tokens[:count]))


def phase_of_prompt(form: ReasoningFormat, prompt_end: str) -> Phase:
    """The phase in which the text of a prompt ends: many templates open the block themselves."""
    text = prompt_end.rstrip()
    if text.endswith(form.start):
        return Phase.REASONING
    if form.has_channels and text.endswith(MESSAGE) and CHANNEL in text:
        return Phase.ANSWER
    return Phase.OPENING


def phase_of_prefill(form: ReasoningFormat, begun: str) -> Phase:
    """The phase in which the beginning of an answer ends that the input gave."""
    _, start, after = begun.rpartition(form.start)
    return Phase.REASONING if start and form.end not in after else Phase.ANSWER


def _may_begin_header(text: str) -> bool:
    return any(text.startswith(start) or start.startswith(text) for start in (CHANNEL, " to=", "<|start|>"))
