"""The numbers of a run's files, as arrays by variant and prompt.

V variants, P prompts, N samples per prompt, A = P * N answers of a variant: the samples of a prompt are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from cage.rule_names import RuleName
from pipeline.config.variants import Variant, names_of
from pipeline.errors import CageError
from pipeline.evaluation.answers import NUMBERS
from pipeline.evaluation.metrics import Floats
from pipeline.storage.commits import CommitRecord


@dataclass(frozen=True)
class Measurements:
    """The scores and numbers of every answer, [V, A].

    Every variant has all prompts, with a score for each objective: a prompt that lacks one under any variant is left
    out of all, so that every comparison is paired. Judges that measure no objective may lack scores: NaN.

    Args:
        variants: rule, agent temperature and weights of each variant.
        row_ids: the prompts.
        scores_by_judge: scores.
        numbers: what the run recorded, and what texts are like, by name (`answers.NUMBERS`).
        num_left_out: how many prompts were left out.
        num_answers: how many answers were read.
        num_samples: answers to each prompt.
    """

    variants: tuple[Variant, ...]
    row_ids: tuple[str, ...]
    scores_by_judge: Mapping[str, Floats]
    numbers: Mapping[str, Floats]
    num_left_out: int
    num_answers: int
    num_samples: int = 1

    def by_prompt(self, array_VA: Floats) -> Floats:
        """Means over the samples of each prompt, [V, P]."""
        return _mean_of_samples(array_VA.reshape(len(array_VA), len(self.row_ids), self.num_samples))

    @cached_property
    def method_by_variant(self) -> tuple[str, ...]:
        """The method of each variant (`names_of`): its rule, and the unit of its games where there are several."""
        return names_of(self.variants)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The methods, in order of their first variant."""
        return tuple(dict.fromkeys(self.method_by_variant))

    def variant_of(self, method: str) -> Variant:
        """A method's first variant, which has its rule and its unit."""
        return self.variants[self.method_by_variant.index(method)]

    def rule_of(self, method: str) -> RuleName:
        """The rule of a method."""
        return self.variant_of(method).rule

    def temperatures_of(self, method: str) -> list[float]:
        """Agent temperatures of a method's variants."""
        of_method = zip(self.method_by_variant, self.variants, strict=True)
        return list(dict.fromkeys(each.agent_temperature for name, each in of_method if name == method))

    def indices(self, method: str, agent_temperature: float | None = None) -> list[int]:
        """Indices of a method's variants, at one agent temperature or (None) at all.

        Where the rule does not depend on the temperature, its variants stand for every one.
        """
        return [
            at
            for at, (name, variant) in enumerate(zip(self.method_by_variant, self.variants, strict=True))
            if name == method
            and (agent_temperature in (None, variant.agent_temperature) or not variant.rule.uses_temperature)
        ]


def measure(
    tables: Iterable[tuple[pa.Table, pa.Table]],
    variants: Sequence[Variant],
    *,
    judges: Sequence[str],
    needed: Sequence[str],
    num_samples: int,
) -> Measurements:
    """Read answers and scores, and keep the prompts that every variant answered with all `needed` scores.

    Args:
        tables: answers and scores of each shard (`ScoreFiles.tables`).
        variants: the run's variants.
        judges: the judges to read.
        needed: those of them that measure an objective.
        num_samples: samples per prompt and variant.

    Raises:
        CageError: no prompt is left.
    """
    answers, scores = zip(*tables, strict=True)
    read, judged = pa.concat_tables(answers), pa.concat_tables(scores)
    row_ids, prompt_N = np.unique(np.array(judged["row_id"].to_pylist(), dtype=object), return_inverse=True)
    shape = (len(variants), len(row_ids), num_samples)
    where = (_ints(judged, "variant"), prompt_N, _ints(judged, "sample"))
    by_judge = {name: _spread(judged, name, where, shape) for name in judges}
    numbers = {name: _spread(read, name, where, shape) for name in NUMBERS}
    whole_P = np.ones(len(row_ids), dtype=bool)
    for array_VPN in (*(by_judge[name] for name in needed), numbers["num_tokens"]):
        whole_P &= np.isfinite(array_VPN).all((0, 2))
    if not whole_P.any():
        raise CageError("no prompt was answered and judged under every variant, so there is nothing to compare")
    return Measurements(
        variants=tuple(variants),
        row_ids=tuple(row_ids[whole_P]),
        scores_by_judge={name: array[:, whole_P].reshape(len(variants), -1) for name, array in by_judge.items()},
        numbers={name: array[:, whole_P].reshape(len(variants), -1) for name, array in numbers.items()},
        num_left_out=int((~whole_P).sum()),
        num_answers=read.num_rows,
        num_samples=num_samples,
    )


def tokens_per_second(records: Iterable[CommitRecord]) -> float | None:
    """Tokens of all shards divided by the time in which at least one was being decoded.

    Pauses between two commands do not count: overlapping spans of shards are merged before they are added.
    """
    records = list(records)
    seconds, busy_until = 0.0, -np.inf
    for start, end in sorted((each.committed_at - each.seconds, each.committed_at) for each in records):
        seconds += max(0.0, end - max(start, busy_until))
        busy_until = max(busy_until, end)
    return float(sum(each.tokens for each in records) / seconds) if seconds > 0 else None


def _spread(table: pa.Table, name: str, where: tuple[Any, ...], shape: tuple[int, int, int]) -> Floats:
    """A column laid out by variant, prompt and sample; NaN where there is no value."""
    array = np.full(shape, np.nan)
    array[where] = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return array


def _ints(table: pa.Table, name: str) -> Any:
    return table[name].to_numpy()


def _mean_of_samples(array_VPN: Floats) -> Floats:
    known = np.isfinite(array_VPN)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_VP: Floats = np.where(known, array_VPN, 0.0).sum(2) / known.sum(2)
    return mean_VP
