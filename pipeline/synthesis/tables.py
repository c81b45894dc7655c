"""The columns of a data set's files, and the rows that fill them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.storage.tables import MESSAGES, MESSAGES_WITH_TOOLS
from pipeline.synthesis.candidates import Candidate
from pipeline.synthesis.pairs import Pair
from pipeline.synthesis.selection import Dropped
from pipeline.synthesis.settings import DataKind

COLUMN_NOTES = {
    "messages": "the conversation with the answer",
    "prompt": "the conversation before the answer",
    "chosen": "the answer with the higher score, as one assistant message",
    "rejected": "the answer with the lower score",
    "tools": "what the model could call, as JSON text; where the run has tools",
    "score": "what ranks answers, see Settings: synthesis.score",
    "score_chosen": "its score",
    "score_rejected": "its score",
    "margin": "score_chosen minus score_rejected",
    "row_id": "the input row",
    "variant, sample": "which of the run's ways to answer, and which of its samples: the answer in the run's files",
    "rule, agent_temperature": "how base and rewards became a policy",
    "weights": "weight of each principal",
    "rewards": "by principal: sum of the token reward q over the answer, in nats, before weights",
    "judged": "by judge: its score, higher is better",
    "finish_reason": "stop or length",
    "num_tokens": "tokens of the answer, the end token included",
    "kl_per_token": "divergence of the policy from the base, nats per token",
}
ANSWER_COLUMNS = ("variant", "sample", "rule", "agent_temperature", "rewards", "judged", "num_tokens")


@dataclass(frozen=True, slots=True)
class DatasetSchemas:
    """The schemas of a data set's files.

    Args:
        principals: names of the principals; without any, their columns are left out, as Parquet has no empty struct.
        judges: names of the judges; likewise.
        metadata: key-value metadata of every file.
        has_tools: whether conversations may have tools, for which there are columns, as in the run's files.
    """

    principals: Sequence[str]
    judges: Sequence[str]
    metadata: Mapping[str, str]
    has_tools: bool = False

    def schema(self, kind: DataKind | None) -> pa.Schema:
        """The columns of a kind of data, or (None) of the dropped answers."""
        if kind is DataKind.SFT:
            names = ["messages", "tools", "score", "row_id", "weights"]
            names += [*ANSWER_COLUMNS, "finish_reason", "kl_per_token"]
        elif kind is DataKind.PREFERENCES:
            sides = [f"{name}_{side}" for side in ("chosen", "rejected") for name in ANSWER_COLUMNS]
            scores = ["score_chosen", "score_rejected", "margin"]
            names = ["prompt", "chosen", "rejected", "tools", *scores, "row_id", "weights", *sides]
        else:
            names = ["row_id", "variant", "sample", "kind", "reason", "value"]
        fields = [pa.field(name, self._type(name)) for name in names if self._type(name) is not None]
        return pa.schema(fields, metadata=dict(sorted(self.metadata.items())))

    def _type(self, name: str) -> pa.DataType | None:
        stem = name.removesuffix("_chosen").removesuffix("_rejected")
        if name in ("messages", "prompt"):
            return MESSAGES_WITH_TOOLS if self.has_tools else MESSAGES
        if name in ("chosen", "rejected"):
            return MESSAGES
        if name == "tools":
            return pa.string() if self.has_tools else None
        if stem in ("weights", "rewards"):
            return _struct(self.principals)
        if stem == "judged":
            return _struct(self.judges)
        if stem in ("row_id", "rule", "finish_reason", "kind", "reason"):
            return pa.string()
        return pa.int32() if stem in ("variant", "sample", "num_tokens") else pa.float64()


def sft_row(answer: Candidate, score: float | None) -> dict[str, Any]:
    """A row for supervised fine-tuning: the conversation with its answer."""
    return {
        "messages": [*answer.prompt, _reply(answer)],
        "tools": answer.tools,
        "score": score,
        "row_id": answer.row_id,
        "weights": dict(answer.weights),
        **_answer(answer),
        "finish_reason": answer.finish_reason,
        "kl_per_token": answer.kl_per_token,
    }


def pair_row(pair: Pair) -> dict[str, Any]:
    """A row for preference learning, with the columns that TRL reads."""
    chosen, rejected = pair.chosen.candidate, pair.rejected.candidate
    return {
        "prompt": chosen.prompt,
        "chosen": [_reply(chosen)],
        "rejected": [_reply(rejected)],
        "tools": chosen.tools,
        "score_chosen": pair.chosen.score,
        "score_rejected": pair.rejected.score,
        "margin": pair.margin,
        "row_id": chosen.row_id,
        "weights": dict(chosen.weights),
        **{f"{name}_chosen": value for name, value in _answer(chosen).items()},
        **{f"{name}_rejected": value for name, value in _answer(rejected).items()},
    }


def dropped_row(dropped: Dropped) -> dict[str, Any]:
    """A row that names a dropped answer and the reason."""
    answer, failure = dropped.candidate, dropped.failure
    return {
        "row_id": answer.row_id,
        "variant": answer.variant,
        "sample": answer.sample,
        "kind": str(dropped.kind),
        "reason": failure.reason,
        "value": failure.value,
    }


def _answer(answer: Candidate) -> dict[str, Any]:
    return {
        "variant": answer.variant,
        "sample": answer.sample,
        "rule": answer.rule,
        "agent_temperature": answer.agent_temperature,
        "rewards": dict(answer.rewards),
        "judged": {name: None if math.isnan(score) else score for name, score in answer.judged.items()},
        "num_tokens": answer.num_tokens,
    }


def _reply(answer: Candidate) -> dict[str, str]:
    return {"role": "assistant", "content": answer.text}


def _struct(names: Sequence[str]) -> pa.DataType | None:
    return pa.struct([pa.field(name, pa.float64()) for name in names]) if names else None
