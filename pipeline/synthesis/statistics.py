"""Statistics of a data set, taken in a first pass: numbers of rows, reasons for dropping answers, distributions."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.synthesis.candidates import Candidate, as_number
from pipeline.synthesis.selection import Selection
from pipeline.synthesis.settings import DataKind, SynthesisConfig

NUM_BINS = 10
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


@dataclass(frozen=True, slots=True)
class Histogram:
    """A distribution of values.

    Args:
        edges: of the bins; bin i holds values from edges[i] up to edges[i + 1], the last one its upper edge too.
        counts: number of values by bin.
        quantiles: least, 10 %, 50 %, 90 %, most.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    quantiles: tuple[float, float, float, float, float]

    @classmethod
    def of(cls, values: Iterable[float]) -> Histogram | None:
        """The histogram of the finite values; None where there are none."""
        ordered = sorted(value for value in values if math.isfinite(value))
        if not ordered:
            return None
        least, most = ordered[0], ordered[-1]
        num_bins = NUM_BINS if most > least else 1
        edges = [least + (most - least) * at / num_bins for at in range(num_bins)] + [most]
        counts = Counter(min(num_bins - 1, _bin(value, least, most, num_bins)) for value in ordered)
        at = (0, 0.1, 0.5, 0.9, 1)
        return cls(
            tuple(edges),
            tuple(counts[index] for index in range(num_bins)),
            tuple(ordered[round(share * (len(ordered) - 1))] for share in at),  # type: ignore[arg-type]
        )

    def to_json(self) -> dict[str, Any]:
        return {"edges": self.edges, "counts": self.counts, "quantiles": self.quantiles}


@dataclass(slots=True)
class DatasetStatistics:
    """Counts and values over all prompts. Call `add` for each input row's selection.

    Args:
        settings: of the data set.
        num_prompts: by split.
        num_answers: all answers read.
        rows: rows of the files, by kind and split.
        used: answers in a kind of data.
        dropped: answers that are not, by kind and reason; with `used` they add up to all answers.
        values: what the histograms show, by name.
    """

    settings: SynthesisConfig
    num_prompts: Counter[str] = field(default_factory=Counter)
    num_answers: int = 0
    rows: Counter[tuple[DataKind, str]] = field(default_factory=Counter)
    used: Counter[DataKind] = field(default_factory=Counter)
    dropped: dict[DataKind, Counter[str]] = field(default_factory=dict)
    values: dict[str, array[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dropped = {kind: Counter() for kind in self.settings.write}

    def add(self, selection: Selection) -> None:
        """Count one input row."""
        split = VALIDATION if selection.is_validation else TRAIN
        self.num_prompts[split] += 1
        self.num_answers += len(selection.answers)
        self.rows[DataKind.SFT, split] += len(selection.sft)
        self.rows[DataKind.PREFERENCES, split] += len(selection.pairs)
        for kind in self.settings.write:
            self.used[kind] += len(selection.answers)
        for dropped in selection.dropped:
            self.dropped[dropped.kind][dropped.failure.reason] += 1
            self.used[dropped.kind] -= 1
        self._add_values(selection)

    def num_rows(self, kind: DataKind) -> int:
        """Rows of a kind in all splits."""
        return sum(self.rows[kind, split] for split in SPLITS)

    def histograms(self) -> dict[str, Histogram]:
        """Histograms by name, without those of no finite value."""
        found = {name: Histogram.of(values) for name, values in self.values.items()}
        return {name: histogram for name, histogram in found.items() if histogram is not None}

    def to_json(self) -> dict[str, Any]:
        """The statistics as manifest.json holds them."""
        return {
            "prompts": {split: self.num_prompts[split] for split in SPLITS},
            "answers": self.num_answers,
            **{
                str(kind): {
                    "rows": {split: self.rows[kind, split] for split in SPLITS},
                    "answers_used": self.used[kind],
                    "answers_dropped": dict(sorted(self.dropped[kind].items())),
                }
                for kind in self.settings.write
            },
            "histograms": {name: histogram.to_json() for name, histogram in self.histograms().items()},
        }

    def _add_values(self, selection: Selection) -> None:
        for answer in selection.sft:
            self._note("sft", _numbers_of(answer))
            if self.settings.is_ranked:
                self._note("sft", {"score": answer.score(self.settings.score)})
        for pair in selection.pairs:
            scores = {"score_chosen": pair.chosen.score, "score_rejected": pair.rejected.score, "margin": pair.margin}
            self._note("preferences", scores)

    def _note(self, place: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.values.setdefault(f"{place}.{name}", array("d")).append(value)


def _numbers_of(answer: Candidate) -> dict[str, float]:
    rewards = {f"rewards.{name}": as_number(value) for name, value in answer.rewards.items()}
    judged = {f"judged.{name}": value for name, value in answer.judged.items()}
    return {"num_tokens": float(answer.num_tokens), **rewards, **judged}


def _bin(value: float, least: float, most: float, num_bins: int) -> int:
    return int((value - least) / (most - least) * num_bins) if most > least else 0
