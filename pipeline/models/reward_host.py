"""A reward host: one sequence reward model, which scores what the base might say next.

It keeps the keys and values of every row's prefix; candidates are branches of it, read with the newest tokens in one
pass and scored each at its own last token. A score is the model's output for a role's label.

A step is one pass, and another one where prompts of new rows are to be read. Every row attends to its own keys alone,
so that on a CPU its bits do not depend on its company as long as a pass has a few tokens. On a GPU matrix kernels
depend on the number of tokens, and strict passes have the same number, whoever reads.

B rows of a call, R roles of the host, N candidates, T tokens, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.models.branches import Branch, Reading, RowCache, reading
from pipeline.models.memory import MOST_SLOTS
from pipeline.models.messages import Admission, HostRole, RewardSpec
from pipeline.models.static_steps import MIN_ROWS

PASS_TOKENS = 256  # of a strict pass on a GPU, or a multiple of it for a row that alone has more
PADDING = 64  # tokens of one row that nobody reads


@dataclass(slots=True)
class _Row:
    """A row of one role: its prompt, the base's tokens after it, and what was read of both.

    `score` is that of the newest token in the cache; `told` the last answer, so that a repeated call gets the same.
    """

    prompt: list[int]
    answer: list[int]
    label: int
    cache: RowCache = field(default_factory=RowCache)
    score: Tensor | None = None
    told: tuple[list[int], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class _Question:
    """A row, candidates, and a reading with the place of each candidate's last token; None: it is the prefix."""

    row: _Row
    ids: list[int]
    reading: Reading
    places: Sequence[int | None]

    def settle(self, scores_TL: Tensor) -> None:
        """Keep the prefix's score and tell what each candidate adds to it."""
        row, scores_T = self.row, scores_TL[:, self.row.label]
        if self.reading.trunk:
            row.score = scores_T[len(self.reading.trunk) - 1]
        assert row.score is not None
        after = [row.score if place is None else scores_T[place] for place in self.places]
        row.told = (self.ids, torch.stack(after) - row.score if after else scores_T[:0])


class RewardHost:
    """Runs one sequence classifier for `num_slots` rows and several roles.

    Args:
        backbone: the classifier without its head, in eval mode, with the attention of branches.
        head: from hidden states to scores, in float32.
        roles: what it serves.
        spec: each role's label, and how to read the base's tokens where the vocabularies differ.
        num_slots: rows at once.
        context_length: longest sequence that the model reads; what is longer is scored NaN.
        strict: pad passes, so that no row's bits depend on its company.
    """

    def __init__(
        self,
        backbone: Any,
        head: Any,
        roles: Sequence[HostRole],
        spec: RewardSpec,
        *,
        num_slots: int,
        context_length: int | None = None,
        strict: bool = True,
    ) -> None:
        self._backbone = backbone
        self._head = head
        self._roles = tuple(roles)
        self._spec = spec
        self._context_length = context_length
        self._strict = strict
        self._device: torch.device = next(backbone.parameters()).device
        self.num_forwards = 0
        self.resize(num_slots)

    @property
    def device(self) -> torch.device:
        return self._device

    def fitting_slots(self, row_tokens: int) -> int:
        """It keeps no buffers, so that it sets no limit of its own."""
        return MOST_SLOTS[self._device.type]

    def resize(self, num_slots: int) -> None:
        """Forget all rows and hold `num_slots` at once from now on."""
        self._rows: list[list[_Row]] = [[] for _ in range(num_slots)]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def advance(self, admissions: Sequence[Admission], slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Read the prompts of new rows; note a token more of the running ones, to be read with its candidates."""
        filled = [each for each in admissions if each.is_last]  # a long prompt is read at once, with its last part
        for admission in filled:
            self._rows[admission.slot] = [
                _Row([*admission.prompts[role.name]], [*admission.answer], label)
                for role, label in zip(self._roles, self._spec.labels, strict=True)
            ]
        self._ask([(row, []) for admission in filled for row in self._rows[admission.slot]])
        for slot, token in zip(slots, tokens, strict=True):
            for row in self._rows[slot]:
                row.answer.append(token)
                row.told = None

    @torch.inference_mode()
    def rewards_at(self, slots: Sequence[int], ids_BN: Tensor) -> Tensor:
        """What each candidate adds to its row's score: score(prefix + a) - score(prefix), [B, R, N]."""
        wanted = [(row, ids) for slot, ids in zip(slots, ids_BN.tolist(), strict=True) for row in self._rows[slot]]
        self._ask([(row, ids) for row, ids in wanted if row.told is None or row.told[0] != ids])
        told = [row.told[1] for row, _ in wanted if row.told is not None]
        return torch.stack(told).view(len(slots), len(self._roles), -1)

    @torch.inference_mode()
    def score(self, prompts: Mapping[str, Sequence[int]], continuation: Sequence[int]) -> Tensor:
        """Teacher forcing: what each token of an answer adds to each role's score, [R, T], in one pass a role."""
        answers = [continuation[:count] for count in range(len(continuation) + 1)]
        rewards = []
        for role, label in zip(self._roles, self._spec.labels, strict=True):
            sequences = self._sequences(prompts[role.name], answers)
            if not self._fits(sequences):
                rewards.append(torch.full((len(continuation),), torch.nan, device=self._device))
                continue
            whole, places = lay_out(RowCache(), sequences[-1], sequences)
            [scores_TL] = self._read([whole])
            rewards.append(scores_TL[:, label][torch.tensor(places, device=self._device)].diff())
        return torch.stack(rewards)

    def _ask(self, wanted: Sequence[tuple[_Row, list[int]]]) -> None:
        """Let every row tell what its candidates add; without candidates, read its prefix."""
        questions = []
        for row, ids in wanted:
            prefix, *followers = self._sequences(row.prompt, [row.answer, *([*row.answer, token] for token in ids)])
            if self._fits([prefix, *followers]):
                questions.append(_Question(row, ids, *lay_out(row.cache, prefix, followers)))
            else:
                row.told = (ids, torch.full((len(ids),), torch.nan, device=self._device))
        for part in self._passes(questions):
            for question, scores_TL in zip(part, self._read([each.reading for each in part]), strict=True):
                question.settle(scores_TL)

    def _passes(self, questions: Sequence[_Question]) -> list[list[_Question]]:
        """Questions that are read at once: all, or as many as a pass has tokens."""
        if not self._has_one_shape:
            return [[*questions]] if questions else []
        parts: list[list[_Question]] = []
        room = 0
        for question in questions:
            count = len(question.reading.tokens)
            if count > room:
                parts.append([])
                room = -(-count // PASS_TOKENS) * PASS_TOKENS
            parts[-1].append(question)
            # what fills more than a pass is alone, so that its shape is its own
            room = room - count if count <= PASS_TOKENS else 0
        return parts

    @property
    def _has_one_shape(self) -> bool:
        return self._strict and self._device.type != "cpu"

    def _read(self, readings: Sequence[Reading]) -> Sequence[Tensor]:
        """Scores [T, L] of every token of each reading, in one forward pass."""
        counts = [len(each.tokens) for each in readings]
        if not sum(counts):
            return [torch.zeros(0, max(self._spec.labels) + 1, device=self._device) for _ in readings]
        self.num_forwards += 1
        padded = [*readings, *self._padding(sum(counts))]
        ids = torch.tensor([[token for each in padded for token in each.tokens]], device=self._device)
        positions = torch.tensor([[at for each in padded for at in each.positions]], device=self._device)
        with reading(padded):
            output = self._backbone(input_ids=ids, position_ids=positions, use_cache=False)
        states = torch.split(output.last_hidden_state[0, : sum(counts)].float(), counts)
        # one by one: the bits of a product with one column depend on how many rows it has
        return [self._head(states_TH) for states_TH in states]

    def _padding(self, num_tokens: int) -> list[Reading]:
        """Rows that nobody reads, for what a strict pass of so many tokens lacks."""
        missing = 0
        if self._has_one_shape:
            missing = -num_tokens % PASS_TOKENS
        elif self._strict:
            missing = max(0, MIN_ROWS - num_tokens)
        longest = min(PADDING, self._context_length or PADDING)
        return [Reading(RowCache(), 0, [0] * min(longest, missing - at)) for at in range(0, missing, longest)]

    def _sequences(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[list[int]]:
        """What the model reads for each answer, in its own tokens."""
        if self._spec.retokeniser is not None:
            answers = self._spec.retokeniser.encode(answers)
        return [[*prompt, *answer] for answer in answers]

    def _fits(self, sequences: Sequence[Sequence[int]]) -> bool:
        return self._context_length is None or max(map(len, sequences)) <= self._context_length


def lay_out(
    cache: RowCache, prefix: Sequence[int], followers: Sequence[Sequence[int]]
) -> tuple[Reading, list[int | None]]:
    """Read the prefix as trunk, from where the cache ends, and what follows as branches where it leaves the prefix.

    The places are those of each follower's last token in the reading; None for the prefix that was read before.
    """
    kept = num_shared(cache.tokens, prefix)
    if kept == len(prefix) < len(cache.tokens):
        kept -= 1  # the score of the prefix's own last token is not known
    branches: list[Branch] = []
    places: list[int | None] = []
    count = len(prefix) - kept
    for follower in followers:
        fork = num_shared(prefix, follower)
        if fork == len(follower):
            if fork > kept or fork == len(prefix):
                places.append(fork - kept - 1 if fork > kept else None)
                continue
            fork -= 1
        branches.append(Branch(fork, follower[fork:]))
        count += len(follower) - fork
        places.append(count - 1)
    return Reading(cache, kept, prefix[kept:], branches), places


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
