"""What answers are like, whatever judges say: how long, how they ended, how far from the base, how repetitive."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.evaluation.judges.words import distinct, repetition
from pipeline.records import FinishReason

RECORDED = ("num_tokens", "kl_per_token", "covered_mass", "max_residual", "num_unsolved")
ENDINGS = {"ended": FinishReason.STOP, "cut": FinishReason.LENGTH, "in_reasoning": FinishReason.REASONING}
REASONING_TOKENS = "num_reasoning_tokens"
DISTINCT_N, REPEATED_N = 2, 3
# of every answer: what the run recorded, tokens of what judges read (without those of the reasoning), nats of KL over
# all of its tokens, 0 or 1 for each way to end and for no text, and shares of different pairs of words, and of words
# in three that occurred before
NUMBERS = (*RECORDED, "answer_tokens", "kl_per_answer", *ENDINGS, "empty", "distinct_2", "repetition_3")
ANSWER_COLUMNS = ("row_id", "variant", "sample", *RECORDED, "finish_reason", "response")


def as_numbers(answers: pa.Table) -> pa.Table:
    """A table with row_id, variant, sample and NUMBERS, from one with ANSWER_COLUMNS; texts are not kept.

    It has `num_reasoning_tokens` where judges do not read the reasoning.
    """
    kept = [name for name in ("row_id", "variant", "sample", *RECORDED) if name in answers.column_names]
    table = answers.select(kept)
    num_tokens, per_token = (answers[name].cast(pa.float64()).to_numpy() for name in ("num_tokens", "kl_per_token"))
    reasons = np.array(answers["finish_reason"].to_pylist(), dtype=object)
    texts = [text or "" for text in answers["response"].to_pylist()]
    not_read = [0] * answers.num_rows
    if REASONING_TOKENS in answers.column_names:
        not_read = [count or 0 for count in answers[REASONING_TOKENS].to_pylist()]
    found = {
        "answer_tokens": num_tokens - np.array(not_read, dtype=np.float64),
        "kl_per_answer": num_tokens * per_token,
        **{name: (reasons == str(reason)).astype(np.float64) for name, reason in ENDINGS.items()},
        "empty": [float(not text.strip()) for text in texts],
        "distinct_2": [distinct(text, DISTINCT_N) for text in texts],
        "repetition_3": [repetition(text, REPEATED_N) for text in texts],
    }
    for name, values in found.items():
        table = table.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
    return table
