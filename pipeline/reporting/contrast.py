"""Compare two rules on the same prompt, at the same agent temperature and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cage.rule_names import RuleName
from pipeline.reporting.columns import Batch

RULE, AGAINST = str(RuleName.EQUILIBRIUM), str(RuleName.LINEAR)


@dataclass(frozen=True, slots=True)
class Contrast:
    """Each row of a batch against its counterpart under the other rule.

    Args:
        gains: how much more the principal with the lowest reward got; NaN where there is no counterpart.
        partners: the counterpart's index in the batch; -1 where there is none.
    """

    gains: np.ndarray[Any, np.dtype[np.float64]]
    partners: np.ndarray[Any, np.dtype[np.int64]]


def contrast(batch: Batch, worst_rewards: np.ndarray[Any, np.dtype[np.float64]], names: Sequence[str]) -> Contrast:
    """Pair rows of the equilibrium with rows of the weighted sum (rule linear).

    All answers to a prompt are neighbours in the file, so pairs are only looked for within the batch.

    Args:
        batch: the rows.
        worst_rewards: the lowest reward of each row.
        names: of the principals.
    """
    gains = np.full(len(batch), np.nan)
    partners = np.full(len(batch), -1, dtype=np.int64)
    if RULE not in batch.rules or AGAINST not in batch.rules:
        return Contrast(gains, partners)
    columns = [batch.numbers["agent_temperature"], *(batch.numbers[f"weights.{name}"] for name in names)]
    terms = np.stack(columns, axis=1).tolist()
    ours: dict[tuple[Any, ...], int] = {}
    theirs: dict[tuple[Any, ...], int] = {}
    for at, rule in enumerate(batch.rules):
        if rule in (RULE, AGAINST):
            key = (batch.row_ids[at], batch.samples[at], *terms[at])
            (ours if rule == RULE else theirs)[key] = at
    for key, at in ours.items():
        if key in theirs:
            partners[at] = theirs[key]
            gains[at] = worst_rewards[at] - worst_rewards[theirs[key]]
    return Contrast(gains, partners)
