"""What one forward pass of a host computes: packed tokens, and the cache rows that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.attention.prefixes import Key, Prompt
from pipeline.attention.segments import Copied, Segment

PADDING = -1  # the last place of the newest logits, which is never read


@dataclass(slots=True)
class ForwardBatch:
    """Parts of prompts, and one token per running row.

    Args:
        segments: parts of prompts that are computed.
        tokens: of all segments, one after another.
        positions: of these tokens in their rows.
        rows: the cache rows that compute one token; a row with proposed tokens is there once for each as well.
        lengths: of these rows, up to that token.
        last_tokens: that token; DRAWN where only the device knows it.
        last_slots: the slot of each, by which the device finds a drawn token.
        outputs: the place of its logits among the newest.
        prefix_copies: parts that rows copy from rows that compute them in the same pass.
        filled: cache rows whose prompt is complete after the pass, with the prompt.
        parts: by cache row, which part of its prompt the pass has.
        begun: by key, the first cache row that begins with this prompt in the pass.
    """

    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    last_tokens: list[int] = field(default_factory=list)
    last_slots: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    prefix_copies: list[Copied] = field(default_factory=list)
    filled: list[tuple[int, Prompt]] = field(default_factory=list)
    parts: dict[int, int] = field(default_factory=dict)
    begun: dict[Key, int] = field(default_factory=dict)

    def begin(self, row: int, prompt: Prompt) -> tuple[int, int]:
        """Note a row that begins in this pass; the row before it that shares the longest prefix, and its length."""
        found = next(((self.begun[key], len(key.tokens)) for key in prompt.keys if key in self.begun), (row, 0))
        for key in prompt.keys:
            self.begun.setdefault(key, row)
        return found

    def compute(self, row: int, prompt: Prompt, start: int, stop: int) -> None:
        """Compute tokens [start, stop) of a prompt."""
        self.segments += [Segment(row, *cut) for cut in prompt.segments(start, stop)]
        self.tokens += prompt.tokens[start:stop]
        self.positions += range(start, stop)

    def append(self, row: int, position: int, token: int, output: int, slot: int = 0) -> None:
        """Have a row compute a token that comes after all others of it; its logits go to `output`."""
        self.rows.append(row)
        self.lengths.append(position + 1)
        self.last_tokens.append(token)
        self.last_slots.append(slot)
        self.outputs.append(output)

    def pad(self, min_rows: int, *, row: int) -> None:
        """Add padding tokens to a spare row until there are `min_rows` rows; an empty pass stays empty."""
        for _ in range(min_rows - len(self.rows) if self.tokens or self.rows else 0):
            self.append(row, 0, 0, PADDING)

    def prompt_passes(self, num_tokens: int, most_segments: int) -> Iterator[PromptPass]:
        """The parts of prompts, in passes of their own.

        Where a prompt is cut depends on the prompt alone, so that its bits do. A row copies a prefix after the pass
        that computes it and before the pass that reads it, which is why it begins a new pass.

        Args:
            num_tokens: of a pass, at most.
            most_segments: of a pass, at most.
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
    """A pass over parts of prompts.

    Args:
        copies: made before the pass.
        segments: that are computed.
        tokens: of the segments, one after another.
    """

    copies: list[Copied] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
