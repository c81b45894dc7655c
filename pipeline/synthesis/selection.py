"""Decide for the answers to one prompt: keep them for SFT, pair them, or drop them for a reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.synthesis.candidates import Candidate, by_weights
from pipeline.synthesis.duplicates import KeptTexts, prompt_digest
from pipeline.synthesis.filters import Failure, Filters
from pipeline.synthesis.pairs import Pair, Scored, make_pairs
from pipeline.synthesis.settings import DataKind, SynthesisConfig

NOT_BEST = "sft.best"
Key = tuple[int, int]  # variant and sample: which of a row's answers


@dataclass(frozen=True, slots=True)
class Dropped:
    """One answer that is not in a kind of data, and why."""

    kind: DataKind
    candidate: Candidate
    failure: Failure


@dataclass(frozen=True, slots=True)
class Selection:
    """What is made of the answers to one input row.

    In each kind of data that is written, every answer is either used or dropped, exactly once.

    Args:
        is_validation: whether the row belongs to the validation split.
        answers: all answers.
        sft: those kept for supervised fine-tuning.
        pairs: the preference pairs.
        dropped: the others, with their reasons.
    """

    is_validation: bool
    answers: Sequence[Candidate]
    sft: Sequence[Candidate]
    pairs: Sequence[Pair]
    dropped: Sequence[Dropped]


class Selector:
    """Selects answers row by row, in the order of the run: it remembers kept texts, to drop their duplicates."""

    def __init__(self, settings: SynthesisConfig) -> None:
        duplicates = settings.filters.duplicates
        self._settings = settings
        self._filters = Filters(settings)
        self._near_in_row = duplicates.near if duplicates.within == "prompt" else None
        self._kept = KeptTexts(
            exact=duplicates.exact, near=duplicates.near if duplicates.within == "dataset" else None
        )

    def select(self, answers: Sequence[Candidate]) -> Selection:
        """Select from all answers to one input row."""
        duplicates = self._settings.filters.duplicates
        kept_in_row = KeptTexts(exact=False, near=self._near_in_row)
        sft: list[Candidate] = []
        pairs: list[Pair] = []
        dropped: list[Dropped] = []
        for group in by_weights(answers):
            texts = KeptTexts(exact=duplicates.exact, near=duplicates.near)
            survivors, failures = self._sort_out(group, texts)
            if DataKind.SFT in self._settings.write:
                kept, further = self._keep(survivors, kept_in_row)
                sft += kept
                dropped += _dropped(DataKind.SFT, group, failures | further)
            if DataKind.PREFERENCES in self._settings.write:
                made, unpaired = self._pair(group, survivors, failures, texts)
                pairs += made
                dropped += _dropped(DataKind.PREFERENCES, group, unpaired)
        return Selection(is_validation(answers[0], self._settings), answers, sft, pairs, dropped)

    def _sort_out(self, group: Sequence[Candidate], texts: KeptTexts) -> tuple[list[Candidate], dict[Key, Failure]]:
        """The answers that pass all filters and repeat no other answer of the group, and why the others fail."""
        survivors: list[Candidate] = []
        failures: dict[Key, Failure] = {}
        for answer in group:
            failure = self._filters.check(answer) or _repeat(answer, texts)
            if failure is None:
                texts.add(answer.text)
                survivors.append(answer)
            else:
                failures[_key(answer)] = failure
        return survivors, failures

    def _keep(
        self, survivors: Sequence[Candidate], kept_in_row: KeptTexts
    ) -> tuple[list[Candidate], dict[Key, Failure]]:
        """The best answers under one weight vector that repeat no kept answer, in the order of the run."""
        best = list(survivors)
        if self._settings.sft.best is not None:
            ranked = sorted(survivors, key=lambda answer: -answer.score(self._settings.score))
            best = sorted(ranked[: self._settings.sft.best], key=_key)
        kept: list[Candidate] = []
        failures = {_key(answer): Failure(NOT_BEST) for answer in survivors if answer not in best}
        for answer in best:
            context = prompt_digest(answer.prompt) + (answer.tools or "").encode()
            reason = self._kept.find(answer.text, context=context) or kept_in_row.find(answer.text)
            if reason is not None:
                failures[_key(answer)] = Failure(reason)
                continue
            self._kept.add(answer.text, context=context)
            kept_in_row.add(answer.text)
            kept.append(answer)
        return kept, failures

    def _pair(
        self,
        group: Sequence[Candidate],
        survivors: Sequence[Candidate],
        failures: Mapping[Key, Failure],
        texts: KeptTexts,
    ) -> tuple[list[Pair], dict[Key, Failure]]:
        """The pairs under one weight vector, and why each other answer is in no pair."""
        by = self._settings.score
        answers = [Scored(answer, answer.score(by)) for answer in survivors]
        for answer in self._weak(group, failures):
            if _repeat(answer, texts) is None:
                texts.add(answer.text)
                answers.append(Scored(answer, answer.score(by), is_weak=True))
        pairs, reasons = make_pairs(answers, self._settings.pairs)
        unpaired = dict(failures)
        for scored, reason in zip(answers, reasons, strict=True):
            key = _key(scored.candidate)
            if reason is None:
                unpaired.pop(key, None)
            else:
                unpaired.setdefault(key, Failure(reason))
        return pairs, unpaired

    def _weak(self, group: Sequence[Candidate], failures: Mapping[Key, Failure]) -> Iterator[Candidate]:
        """Answers that a filter of quality dropped, and that may still be the rejected side of a pair."""
        if self._settings.pairs.weak_rejected:
            for answer in group:
                failure = failures.get(_key(answer))
                if failure is not None and failure.is_weak and not math.isnan(answer.score(self._settings.score)):
                    yield answer


def is_validation(answer: Candidate, settings: SynthesisConfig) -> bool:
    """Whether the answer's prompt belongs to the validation split.

    A hash of the prompt's text, keyed by the seed, decides: equal prompts are in one split, in every run.
    """
    digest = prompt_digest(answer.prompt, key=settings.seed.to_bytes(8, "big"))
    return int.from_bytes(digest[:8], "big") < settings.validation * 2**64


def _key(answer: Candidate) -> Key:
    return answer.variant, answer.sample


def _repeat(answer: Candidate, texts: KeptTexts) -> Failure | None:
    reason = texts.find(answer.text)
    return None if reason is None else Failure(reason)


def _dropped(kind: DataKind, group: Sequence[Candidate], failures: Mapping[Key, Failure]) -> Iterator[Dropped]:
    for answer in group:
        failure = failures.get(_key(answer))
        if failure is not None:
            yield Dropped(kind, answer, failure)
