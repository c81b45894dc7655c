"""Runs with given answers, without any model, and the data sets that are made of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.evaluation.panel import resolve_panel
from pipeline.evaluation.scores import SCORES, ScoreFiles
from pipeline.records import FinishReason, Record
from pipeline.stages.judge import judge
from pipeline.storage.plan import make_plan
from pipeline.storage.run import Run
from pipeline.stores.store import open_store
from pipeline.synthesis.candidates import read_candidates
from pipeline.synthesis.dataset import Dataset, make_dataset
from pipeline.synthesis.settings import SynthesisConfig
from support.decoding import NOWHERE
from support.storage import MODELS, PRINCIPALS, make_config, write_jsonl

Answers = Mapping[str, Sequence[str | Mapping[str, Any]]]  # by row id; a text alone, or fields of a record


def finished_run(
    folder: Path,
    answers: Answers,
    *,
    place: str | None = None,
    prompts: Mapping[str, str] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    **sections: Any,
) -> Run:
    """A complete run in which each row got the answers given, in order of variant and sample.

    Its input is `rows`, or a row for each id of `answers` with a text of `prompts`.
    """
    texts = {row_id: f"question {row_id}" for row_id in answers} | dict(prompts or {})
    folder.mkdir(exist_ok=True)
    rows = rows or [{"id": row_id, "prompt": texts[row_id]} for row_id in answers]
    path = write_jsonl(folder / "prompts.jsonl", rows)
    [num_answers] = {len(each) for each in answers.values()}
    num_vectors = len(sections.get("grid", {}).get("weights", [None]))
    sections["decoding"] = {"n": num_answers // num_vectors, **sections.get("decoding", {})}
    config = make_config(path, place or folder / "run", **{"input": {"id": "id"}, **sections})
    run = Run.create_or_resume(open_store(config.output.path), make_plan(config, MODELS))
    for shard in run.plan.shards:
        records = [
            _record(run, row, at, answer)
            for row in run.plan.read_shard(shard)
            for at, answer in enumerate(answers[row.row_id])
        ]
        run.commit(shard, records)
    run.finish()
    return run


def _record(run: Run, row: Any, at: int, answer: str | Mapping[str, Any]) -> Record:
    given = {"text": answer} if isinstance(answer, str) else dict(answer)
    text = given.pop("text", f"answer {at}")
    variant, sample = divmod(at, run.plan.num_samples)
    weights = run.plan.variants[variant].weights or dict.fromkeys(PRINCIPALS, 1.0)
    reward = given.pop("reward", float(at))
    return Record(
        row_id=row.row_id,
        variant=variant,
        sample=sample,
        rule="equilibrium",
        agent_temperature=0.1,
        prompt=row.messages,
        tools=row.tools,
        response=text,
        weights=weights,
        **{
            "finish_reason": FinishReason.STOP,
            "num_tokens": len(text.split()) + 1,
            "rewards": {"brief": reward, "kind-1": 2 * reward},
            "payments": dict.fromkeys(PRINCIPALS, 0.0),
            **given,
        },
    )


def dataset_of(run: Run, **sections: Any) -> Dataset:
    """The data set of a run; what judges it has are those of texts."""
    settings = SynthesisConfig.model_validate({"validation": 0.0, **sections})
    scores = ScoreFiles(run, resolve_panel(settings.judges, NOWHERE))
    if settings.judges:
        judge(scores, make_config("unused"), io.StringIO())
    return make_dataset(run, settings, lambda name: read_candidates(run, name, SCORES if settings.judges else None))


def rows_of(dataset: Dataset, stem: str) -> list[dict[str, Any]]:
    """The rows of the files that begin with `stem`, such as "sft/train"."""
    folder = Path(dataset.run.store.path) / "_dataset"
    names = [file["name"] for file in dataset.manifest["files"] if file["name"].startswith(stem)]
    return [row for name in names for row in pq.read_table(folder / name).to_pylist()]


def key_of(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["row_id"], row["variant"], row["sample"]
