"""What one forward pass of a host is going to compute: packed tokens, and where they belong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.attention.prefixes import Key, Prompt
from pipeline.attention.segments import Copied, Segment


@dataclass(slots=True)
class ForwardBatch:
    """Parts of prompts (`segments`, with `tokens` and `positions`) and one token a running row (`rows`, `lengths`,
    `last_tokens`, and `last_slots` for tokens that the device alone knows).

    `prefix_copies` are parts that a row copies from one that computes them in this very pass; `filled` the rows whose
    prompt is complete after it.
    """

    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    last_tokens: list[int] = field(default_factory=list)
    last_slots: list[int] = field(default_factory=list)
    prefix_copies: list[Copied] = field(default_factory=list)
    filled: list[tuple[int, Prompt]] = field(default_factory=list)
    parts: dict[int, int] = field(default_factory=dict)
    begun: dict[Key, int] = field(default_factory=dict)

    def begin(self, row: int, prompt: Prompt) -> tuple[int, int]:
        """A row that begins in this pass with the longest part of the same prompt, and that part's length."""
        found = next(((self.begun[key], len(key.tokens)) for key in prompt.keys if key in self.begun), (row, 0))
        for key in prompt.keys:
            self.begun.setdefault(key, row)
        return found

    def compute(self, row: int, prompt: Prompt, start: int, stop: int) -> None:
        """Compute tokens [start, stop) of a prompt."""
        self.segments += [Segment(row, *cut) for cut in prompt.segments(start, stop)]
        self.tokens += prompt.tokens[start:stop]
        self.positions += range(start, stop)

    def append(self, row: int, position: int, token: int, slot: int = 0) -> None:
        """Give a running row of a slot its next token."""
        self.rows.append(row)
        self.lengths.append(position + 1)
        self.last_tokens.append(token)
        self.last_slots.append(slot)

    def pad(self, min_rows: int, *, row: int) -> None:
        """Give `row` tokens that nobody reads until there are enough rows."""
        for _ in range(min_rows - len(self.rows) if self.tokens or self.rows else 0):
            self.append(row, 0, 0)

    def prompt_passes(self, num_tokens: int, most_segments: int) -> Iterator[PromptPass]:
        """The prompts alone, in passes of at most so many tokens and segments.

        Where a prompt is cut depends on the prompt alone. What a row copies from another is copied before the pass
        that reads it, which is a later one than the pass that computes it.
        """
        prefix_copies = {copied.row: copied for copied in self.prefix_copies}
        part = PromptPass()
        at = 0
        for segment in self.segments:
            if segment.row in prefix_copies:
                if part.segments:
                    yield part
                    part = PromptPass()
                part.copies.append(prefix_copies.pop(segment.row))
            for start in range(segment.start, segment.stop, num_tokens):
                stop = min(start + num_tokens, segment.stop)
                if len(part.tokens) + stop - start > num_tokens or len(part.segments) == most_segments:
                    yield part
                    part = PromptPass()
                part.segments.append(Segment(segment.row, start, stop))
                part.tokens += self.tokens[at : at + stop - start]
                at += stop - start
        if part.segments:
            yield part
        if prefix_copies:
            yield PromptPass(copies=list(prefix_copies.values()))


@dataclass(slots=True)
class PromptPass:
    """Segments of prompts with their tokens, and what is copied before they are computed."""

    copies: list[Copied] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
