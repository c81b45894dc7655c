"""Runs one model that scores the base's candidates for the next token as branches of each row's cached prefix.

It keeps the keys and values of every row's prefix. Candidates are branches of it: they are read with the newest
tokens in one pass. A scorer says what their scores are: the output of a head, or the log-probability of a text.

A step is one pass, and more where prompts of new rows are read: all of a prompt but its last token, in parts of
limited length. What another row has cached of a prompt is copied. Every row attends to its own keys alone, so that on
a CPU its bits do not depend on the batch composition as long as a pass has a few tokens. On a GPU matrix kernels
depend on the number of tokens, so strict passes all have the same number.

B rows of a call, R roles of the host, N candidates, T tokens, H the width of the hidden states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pipeline.attention.branches import Reading, RowCache, reading
from pipeline.attention.prefixes import Key, Prefixes, Prompt
from pipeline.attention.visibility import LayerFacts
from pipeline.hub.retokeniser import Retokeniser
from pipeline.protocol.memory import memory_of_host
from pipeline.protocol.messages import CHUNK, Admission, MemoryBudget, Step
from pipeline.protocol.topology import HostRole
from pipeline.worker.adapters import TokenAdapters
from pipeline.worker.branch_rows import BranchRow, Scorer, ScoringRequest, Text
from pipeline.worker.captured_passes import MIN_ROWS
from pipeline.worker.layer_devices import devices_of
from pipeline.worker.memory import budget_of, pass_sizes
from pipeline.worker.stopwatch import Stopwatch
from pipeline.worker.whole_vectors import WholeVectors

PASS_TOKENS = 256  # of a strict pass on a GPU, or a multiple of it for a row that alone has more
PADDING = 64  # tokens of one padding row
AdaptedReading = tuple[Reading, int]  # with the number of its adapter


class BranchRunner:
    """Runs one model for `num_slots` rows and several roles.

    Args:
        backbone: the model without its head, in eval mode, with the attention of branches.
        scorer: makes scores out of its hidden states.
        roles: what it serves.
        retokeniser: reads the base's tokens where the model's own differ; None: they are the same.
        stop_ids: the base's tokens that end an answer.
        adapters: of the model, where a role has one.
        num_slots: rows at once.
        num_candidates: that it reads at most, where roles do not say so.
        vocab_size: logits of each token that is read; 0 where only hidden states are kept.
        context_length: longest sequence that the model reads; what is longer is scored NaN.
        strict: pad passes, so that no row's bits depend on the batch composition.
        bytes_per_token: what one token of one row takes in the cache, by device.
        layers: what each attention call of a pass asks for, as `learn_layers` found.
        needs_whole_vectors: whether activations have to be padded for a row's bits to be its own; see `WholeVectors`.
    """

    def __init__(
        self,
        backbone: Any,
        scorer: Scorer,
        roles: Sequence[HostRole],
        *,
        num_slots: int,
        num_candidates: int = 0,
        vocab_size: int = 0,
        retokeniser: Retokeniser | None = None,
        stop_ids: frozenset[int] = frozenset(),
        adapters: TokenAdapters | None = None,
        context_length: int | None = None,
        strict: bool = True,
        bytes_per_token: Mapping[torch.device, int] = MappingProxyType({}),
        layers: Sequence[LayerFacts] = (),
        needs_whole_vectors: bool = False,
    ) -> None:
        self._layers = layers
        self._num_candidates, self._vocab_size = num_candidates, vocab_size
        self._needs_whole_vectors = needs_whole_vectors
        self._backbone = backbone
        self._scorer = scorer
        self._roles = tuple(roles)
        self._retokeniser = retokeniser
        self._stop_ids = stop_ids
        self._adapters = adapters
        self._context_length = context_length
        self._strict = strict
        self._bytes_per_token = bytes_per_token
        self._devices = devices_of(backbone)
        self._device = self._devices[0]
        self.num_forwards = self.num_tokens = 0
        self._watch = Stopwatch(self._device)
        self.resize(num_slots)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def roles(self) -> tuple[HostRole, ...]:
        """What it serves."""
        return self._roles

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of `row_tokens` tokens, and what is free."""
        scored = max((role.scoring.candidates for role in self._roles if role.scoring), default=self._num_candidates)
        memory_of = partial(
            memory_of_host,
            pass_sizes(self._backbone, self._vocab_size),
            num_roles=len(self._roles),
            row_tokens=row_tokens,
            scored_tokens=1 + scored,
            device_type=self._device.type,
        )
        return budget_of(self._devices, memory_of, bytes_per_token=self._bytes_per_token)

    @property
    def work(self) -> tuple[int, int, float]:
        """Passes so far, tokens that went through them, and the seconds that they took."""
        return self.num_forwards, self.num_tokens, self._watch.seconds

    @property
    def cache_bytes(self) -> int:
        """Bytes that its rows take in memory."""
        return sum(row.cache.num_bytes for rows in self._rows for row in rows)

    @property
    def cache_bytes_per_token(self) -> Counter[torch.device]:
        """Bytes per token of one row, by device; none before the first pass."""
        found = (row.cache.bytes_per_token() for rows in self._rows for row in rows)
        return max(found, key=Counter.total, default=Counter())

    def resize(self, num_slots: int) -> None:
        """Forget all rows and hold `num_slots` at once from now on."""
        self._rows: list[list[BranchRow]] = [[] for _ in range(num_slots)]
        self._prefixes: Prefixes[RowCache] = Prefixes()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def advance(self, step: Step) -> None:
        """Read parts of new rows' prompts, and note one token of each running row.

        A noted token is read in one pass with its candidates, by `rewards_at`.
        """
        replaced = self._replace([each for each in step.admissions if each.part == 0])
        parts = [(row, (each.part + 1) * CHUNK) for each in step.admissions for row in self._rows[each.slot]]
        try:
            while parts:
                parts = self._fill(parts)
        finally:
            # only now: their prefixes may have been copied to new rows
            for cache in replaced:
                self._prefixes.drop(cache)
        for slot, token in zip(step.slots, step.tokens, strict=True):
            for row in self._rows[slot]:
                row.answer.append(token)
                row.scored = None

    def rewards_at(self, slots: Sequence[int], ids_BN: Tensor) -> Tensor:
        """What each candidate adds to its row's score: score(prefix + a) - score(prefix), [B, R, N]."""
        return torch.stack(self.gains(slots, ids_BN.tolist()))

    @torch.inference_mode()
    def gains(self, slots: Sequence[int], ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """The same, [R, N] for each row, which may have any number of candidates."""
        wanted = [(row, list(each)) for slot, each in zip(slots, ids, strict=True) for row in self._rows[slot]]
        self._score_candidates([(row, ids) for row, ids in wanted if row.scored is None or row.scored[0] != ids])
        added = [row.scored[1] for row, _ in wanted if row.scored is not None]
        count = len(self._roles)
        return [torch.stack(added[at : at + count]) for at in range(0, len(added), count)]

    @torch.inference_mode()
    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        """Teacher forcing: what each token of an answer adds to each role's score, [R, T], in one pass per role.

        NaN for a role whose context is too short for the prompt and the answer.
        """
        answers = [answer[:count] for count in range(len(answer) + 1)]
        rewards = []
        for at, role in enumerate(self._roles):
            prompt = Prompt.of(role.adapter, prompts[role.name], 0)
            row = BranchRow(prompt, [], at, self._number(role))
            texts = self._texts(row, answers)
            if not self._fits(texts):
                rewards.append(torch.full((len(answer),), torch.nan, device=self._device))
                continue
            request = self._scorer.request(row, texts[-1], texts)
            [states_TH] = self.read([(request.reading, row.adapter)])
            rewards.append(request.finish(states_TH).diff())
        return torch.stack(rewards)

    def _replace(self, admissions: Sequence[Admission]) -> list[RowCache]:
        """Give slots new rows; returns the caches of replaced rows that new rows will copy a prefix from."""
        gone = [row.cache for each in admissions for row in self._rows[each.slot]]
        for each in admissions:
            self._rows[each.slot] = self._begin(each)
        rows = [row for each in admissions for row in self._rows[each.slot]]
        wanted = {self._prefixes.find(row.prompt, preferred=row.cache)[0] for row in rows}
        for cache in gone:
            if cache not in wanted:
                self._prefixes.drop(cache)
        return [cache for cache in gone if cache in wanted]

    def _begin(self, admission: Admission) -> list[BranchRow]:
        """A row for each role, which has read nothing yet.

        Tokens that the row kept are read with its prompt, unless the model has a vocabulary of its own.
        """
        is_own = self._retokeniser is None
        kept = list(admission.answer)
        return [
            BranchRow(
                Prompt.of(
                    role.adapter,
                    [*admission.prompts[role.name], *(kept if is_own else [])],
                    admission.shared_prefixes.get(role.name, 0),
                    weights=admission.weights if role.takes_weights else (),
                ),
                [] if is_own else list(kept),
                at,
                self._number(role),
            )
            for at, role in enumerate(self._roles)
        ]

    def _fill(self, parts: Sequence[tuple[BranchRow, int]]) -> list[tuple[BranchRow, int]]:
        """Read prompts up to a number of tokens; returns the rows that wait for a prefix that another row reads."""
        begun: set[Key] = set()
        later, filled, readings = [], [], []
        for row, limit in parts:
            stop = min(limit, len(row.prompt.tokens) - 1)
            piece = Prompt.of(
                row.prompt.adapter, row.prompt.tokens[: stop + 1], row.prompt.shared, weights=row.prompt.weights
            )
            found = [self._prefixes.find(prompt, preferred=row.cache) for prompt in (row.prompt, piece)]
            source, held = max(found, key=itemgetter(1))
            start = max(held, len(row.cache.tokens))
            if any(key in begun and len(key.tokens) > start for key in piece.keys):
                later.append((row, limit))
                continue
            if start > len(row.cache.tokens):
                row.cache.take_over(source, start)
            if start < stop:
                begun.update(piece.keys)
                readings += [
                    (Reading(row.cache, first, piece.tokens[first:last]), row.adapter)
                    for first, last in piece.segments(start, stop)
                ]
            filled.append((row.cache, piece))
        self._read_all(readings)
        for cache, piece in filled:
            self._prefixes.put(cache, piece)
        return later

    def _score_candidates(self, wanted: Sequence[tuple[BranchRow, list[int]]]) -> None:
        """Compute what each candidate adds to the score of its row, for all rows in as few passes as possible."""
        requests: list[tuple[BranchRow, list[int], ScoringRequest]] = []
        for row, ids in wanted:
            texts = self._texts(row, [row.answer, *([*row.answer, token] for token in ids)])
            if self._fits(texts):
                requests.append((row, ids, self._scorer.request(row, texts[0], texts)))
            else:
                row.scored = (ids, torch.full((len(ids),), torch.nan, device=self._device))
        states = self._read_all([(request.reading, row.adapter) for row, _, request in requests])
        for (row, ids, request), states_TH in zip(requests, states, strict=True):
            scores_N = request.finish(states_TH)
            row.scored = (ids, (scores_N[1:] - scores_N[0]).float())

    def _read_all(self, readings: Sequence[AdaptedReading]) -> list[Tensor]:
        """Hidden states [T, H] of every token of each reading. A row may have two readings, in order."""
        return [states_TH for part in self._passes(readings) for states_TH in self.read(part)]

    def _passes(self, readings: Sequence[AdaptedReading]) -> list[list[AdaptedReading]]:
        """The readings of each pass: all in one, or as many as fit into passes of one shape."""
        if not self._has_one_shape:
            return [[*readings]] if readings else []
        parts: list[list[AdaptedReading]] = []
        left = 0  # tokens that still fit into the newest pass
        for each in readings:
            count = len(each[0].tokens)
            if not parts or count > left:
                parts.append([])
                left = -(-count // PASS_TOKENS) * PASS_TOKENS
            parts[-1].append(each)
            # a reading that is longer than a pass is alone: the shape of its pass then depends on it alone
            left = left - count if count <= PASS_TOKENS else 0
        return parts

    @property
    def _has_one_shape(self) -> bool:
        return self._strict and self._device.type != "cpu"

    def read(self, adapted: Sequence[AdaptedReading]) -> list[Tensor]:
        """Hidden states [T, H] of every token of each reading, in one forward pass, in float32."""
        counts = [len(each.tokens) for each, _ in adapted]
        if not sum(counts):
            return [torch.zeros(0, 0, device=self._device) for _ in adapted]
        self.num_forwards += 1
        self.num_tokens += sum(counts)
        readings = [each for each, _ in adapted]
        padded = [*readings, *self._padding(sum(counts))]
        ids = torch.tensor([[token for each in padded for token in each.tokens]], device=self._device)
        positions = torch.tensor([[at for each in padded for at in each.positions]], device=self._device)
        if self._adapters is not None:
            numbers = [number for each, number in adapted for _ in each.tokens]
            numbers += [0] * (ids.shape[1] - len(numbers))
            self._adapters.of_tokens = torch.tensor(numbers, device=self._device)
        whole = WholeVectors() if self._needs_whole_vectors else nullcontext()
        with self._watch.running(), whole, reading(padded, self._layers):
            output = self._backbone(input_ids=ids, position_ids=positions, use_cache=False)
        return list(torch.split(output.last_hidden_state[0, : sum(counts)].float(), counts))

    def _padding(self, num_tokens: int) -> list[Reading]:
        """Padding rows that bring a strict pass of `num_tokens` tokens to its size."""
        missing = 0
        if self._has_one_shape:
            missing = -num_tokens % PASS_TOKENS
        elif self._strict:
            missing = max(0, MIN_ROWS - num_tokens)
        longest = min(PADDING, self._context_length or PADDING)
        return [Reading(RowCache(), 0, [0] * min(longest, missing - at)) for at in range(0, missing, longest)]

    def _texts(self, row: BranchRow, answers: Sequence[Sequence[int]]) -> list[Text]:
        """What the model reads for each answer of the base, in its own tokens."""
        prompt = row.prompt.tokens
        if self._retokeniser is None:
            return [
                Text([*prompt, *answer], is_ended=bool(answer) and answer[-1] in self._stop_ids) for answer in answers
            ]
        read = self._retokeniser.read(answers)
        return [Text([*prompt, *each.ids], is_ended=each.is_ended, pending=each.pending) for each in read]

    def _number(self, role: HostRole) -> int:
        """The number of a role's adapter; 0 is none."""
        return 0 if self._adapters is None else self._adapters.number(role.adapter)

    def _fits(self, texts: Sequence[Text]) -> bool:
        return self._context_length is None or max(len(each.tokens) for each in texts) <= self._context_length
