"""The answers of a run that may enter a data set, read from its files one prompt at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow.parquet as pq

from pipeline.config.variants import Variant
from pipeline.errors import CageError
from pipeline.records import Message
from pipeline.storage.run import Run
from pipeline.storage.shard_files import as_damaged_file
from pipeline.synthesis.settings import REWARD, REWARD_PER_TOKEN

BATCH_ROWS = 1024
COLUMNS = (
    "row_id", "sample", "variant", "rule", "agent_temperature", "prompt", "response", "finish_reason", "num_tokens",
    "weights", "rewards", "kl_per_token", "tools",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer of a run.

    Args:
        row_id, variant, sample: which answer of the run it is.
        rule, agent_temperature, weights: how it was decoded; weights by principal.
        prompt: the conversation before it.
        text: the answer.
        finish_reason: `stop` or `length`.
        num_tokens: its length, the end token included; without the reasoning, where that is no part of it.
        rewards: by principal, the sum of its token reward q in nats, before weights; None where not recorded.
        kl_per_token: divergence of the policy from the base, in nats.
        judged: by judge, its score; NaN where a judge gave none.
        tools: what the model could call, as JSON text; None where there was nothing.
    """

    row_id: str
    variant: int
    sample: int
    rule: str
    agent_temperature: float
    prompt: Sequence[Message]
    text: str
    finish_reason: str
    num_tokens: int
    weights: Mapping[str, float]
    rewards: Mapping[str, float | None]
    kl_per_token: float | None
    judged: Mapping[str, float] = field(default_factory=dict)
    tools: str | None = None

    def score(self, by: str) -> float:
        """The score that ranks the answer; NaN where there is none.

        Args:
            by: `reward` (weighted sum of rewards), `reward_per_token`, or the name of a judge.
        """
        if by not in (REWARD, REWARD_PER_TOKEN):
            return self.judged[by]
        terms = [weight * as_number(self.rewards[name]) for name, weight in self.weights.items()]
        if not terms or (by == REWARD_PER_TOKEN and not self.num_tokens):
            return math.nan
        return sum(terms) / (self.num_tokens if by == REWARD_PER_TOKEN else 1)


def as_number(value: float | None) -> float:
    return math.nan if value is None else value


def data_files(run: Run) -> list[str]:
    """The names of the run's data files, in order."""
    names = [name for record in run.committed().values() for name in record.sha256_by_file]
    return sorted(name for name in names if name.startswith("part-"))


def read_candidates(run: Run, name: str, scores_folder: str | None = None) -> Iterator[Candidate]:
    """Yield the answers of one data file in order; memory holds one batch of rows.

    Args:
        run: the run.
        name: the data file.
        scores_folder: where the score file of the same name is; None for answers without scores.

    Raises:
        CageError: the score file belongs to other answers.
    """
    columns = COLUMNS if run.plan.reasons_in_answers else (*COLUMNS, "num_reasoning_tokens")
    if scores_folder is None:
        yield from (_candidate(row, run.plan.variants) for row in _rows(run, name, columns))
        return
    for row, scores in zip(_rows(run, name, columns), _rows(run, scores_folder + name), strict=True):
        key = [scores.pop(column) for column in ("row_id", "variant", "sample")]
        if key != [row["row_id"], row.get("variant", 0), row["sample"]]:
            raise CageError(f"{run.store.url(scores_folder + name)} scores other answers; remove it")
        scores.pop("_errors", None)
        judged = {judge: as_number(score) for judge, score in scores.items()}
        yield _candidate(row, run.plan.variants, judged)


def _rows(run: Run, name: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    with as_damaged_file(run.store.url(name)), run.store.open(name) as handle, pq.ParquetFile(handle) as file:
        found = file.schema_arrow.names
        for batch in file.iter_batches(BATCH_ROWS, columns=[each for each in columns or found if each in found]):
            yield from batch.to_pylist()


def by_prompt(candidates: Iterator[Candidate]) -> Iterator[list[Candidate]]:
    """Group the answers by input row; a row's answers are neighbours in the file."""
    for _, answers in groupby(candidates, key=lambda candidate: candidate.row_id):
        yield list(answers)


def by_weights(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Group the answers by weight vector, in order of first appearance."""
    groups: dict[tuple[tuple[str, float], ...], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(tuple(candidate.weights.items()), []).append(candidate)
    return list(groups.values())


def _candidate(
    row: Mapping[str, Any], variants: Sequence[Variant], judged: Mapping[str, float] | None = None
) -> Candidate:
    variant = row.get("variant", 0)
    return Candidate(
        row_id=row["row_id"],
        variant=variant,
        sample=row["sample"],
        rule=row.get("rule", str(variants[variant].rule)),
        agent_temperature=row.get("agent_temperature", variants[variant].agent_temperature),
        prompt=row["prompt"],
        text=row["response"],
        finish_reason=row["finish_reason"],
        num_tokens=row["num_tokens"] - (row.get("num_reasoning_tokens") or 0),
        weights=row.get("weights") or {},
        rewards=row.get("rewards") or {},
        kl_per_token=row["kl_per_token"],
        judged=judged or {},
        tools=row.get("tools"),
    )
