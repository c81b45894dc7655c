"""Two rules on the same prompt, at the same agent temperature and weights: where they differ most."""

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
    """For each row of a batch: how much more the worst-served principal got than under the other rule (NaN where the
    row has no counterpart), and the counterpart's index in the batch."""

    gains: np.ndarray[Any, np.dtype[np.float64]]
    partners: np.ndarray[Any, np.dtype[np.int64]]


def contrast(batch: Batch, worst_rewards: np.ndarray[Any, np.dtype[np.float64]], names: Sequence[str]) -> Contrast:
    """Pair the equilibrium's rows with the weighted sum's. Rows of one prompt stand together, so within the batch."""
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
