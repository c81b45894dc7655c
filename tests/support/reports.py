"""Runs to report on: records that are plain functions of their place, with data that would break a careless page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.records import FinishReason, Record, Row, TokenTrace
from pipeline.storage.plan import make_plan
from pipeline.storage.run import Run
from pipeline.stores.store import open_store
from support.storage import MODELS, PRINCIPALS, answer, make_config, write_jsonl

HOSTILE = (
    "<script>window.hacked=1</script>",
    "</script><img src=x onerror=window.hacked=1>",
    "${window.hacked=1} `\\` {{7*7}} {% raw %}",
    "\"quoted\" 'twice' &amp; &lt;b&gt;",
    "escape \x1b[31m bell \x07 zero \x00 end",
    "right to left \u202etxt.exe\u202c and \u2066isolated\u2069",
    "schön 日本語 🎉\nsecond line",
)
GRID = {
    "rules": ["base", "equilibrium", "linear"],
    "agent_temperatures": [0.1, 0.5],
    "weights": [{"brief": 1.0, "kind-1": 0.0}, {"brief": 0.5, "kind-1": 0.5}],
}
ATTACK = HOSTILE[1]


def make_run(
    folder: Path, *, num_rows: int = 7, rows_per_shard: int = 3, path: str | None = None, **sections: Any
) -> Run:
    """A finished run over hostile prompts; the last prompt fails. Every third row has no existing answer."""
    prompts = write_jsonl(
        folder / "prompts.jsonl",
        (
            {
                "id": f"{at} {HOSTILE[at % 7]}",
                "prompt": HOSTILE[at % 7],
                "old": None if at % 3 == 2 else f"an existing answer {ATTACK}",
                "w": {"brief": at / 4, "kind-1": 0.0 if at % 4 == 3 else 0.5},
            }
            for at in range(num_rows)
        ),
    )
    attacked = {name: {**section, "principle": ATTACK} for name, section in PRINCIPALS.items()}
    config = make_config(
        prompts,
        path or folder / "run",
        output={"rows_per_shard": rows_per_shard},
        **{
            "decoding": {"trace": "tokens"},
            "principals": attacked,
            **sections,
            "input": {"id": "id", **sections.get("input", {})},
        },
    )
    plan = make_plan(config, MODELS)
    run = Run.create_or_resume(open_store(path or str(folder / "run")), plan)
    for shard in plan.shards:
        run.commit(shard, [record for row in plan.read_shard(shard) for record in records_of(run, row)])
    run.finish()
    return run


def records_of(run: Run, row: Row) -> Iterator[Record]:
    """Every answer to a row."""
    place = int(row.row_id.split()[0])
    for index, variant in enumerate(run.plan.variants):
        for sample in range(run.plan.num_samples):
            record = answer(row, sample=sample, text=row.messages[0]["content"])
            number = math.sin(1 + place + 10 * index + 100 * sample)
            has_payments = variant.rule == "equilibrium"
            paid = {name: abs(number) * at if has_payments else None for at, name in enumerate(PRINCIPALS)}
            record = replace(
                record,
                variant=index,
                rule=str(variant.rule),
                agent_temperature=variant.agent_temperature,
                weights=variant.weights or row.weights or record.weights,
                finish_reason=FinishReason.LENGTH if (place + sample) % 3 == 1 else FinishReason.STOP,
                num_tokens=10 + place,
                rewards={"brief": number, "kind-1": number**2 - place / 10},
                payments=paid,
                kl_per_token=number**2,
                covered_mass=0.9,
                max_residual=1e-9 * (1 + place),
                solver_steps=3.5,
                tokens=tuple(_tokens(row.messages[0]["content"], number, has_payments=has_payments)),
            )
            if row.response is not None:
                record = _compared(record, row.response, is_equal=place % 5 == 4)
            is_last = place == run.plan.num_rows - 1
            failed = answer(row, sample=sample, variant=index, error=f"no answer: {ATTACK}")
            yield failed if is_last else record


def _compared(record: Record, existing: str, *, is_equal: bool) -> Record:
    """The record beside an existing answer, which may be the same text: then their rewards differ by rounding."""
    if is_equal:
        originals = {name: float(reward or 0.0) - 1e-7 for name, reward in record.rewards.items()}
        return replace(record, original_response=record.response, original_rewards=originals)
    originals = {name: float(reward or 0.0) ** 3 - 0.3 for name, reward in record.rewards.items()}
    return replace(
        record,
        original_response=existing,
        original_rewards=originals,
        chosen=record.response,
        rejected=existing,
    )


def _tokens(text: str, number: float, *, has_payments: bool) -> Iterator[TokenTrace]:
    for at, word in enumerate(text.split(" ")[:6]):
        paid = {"brief": abs(number) * (at % 3), "kind-1": 0.75 * (at % 2)}
        thresholds = {"brief": 1.25, "kind-1": math.inf}
        nothing = dict.fromkeys(PRINCIPALS)
        yield TokenTrace(
            at,
            f" {word}",
            -2.0 - at,
            -1.0,
            paid if has_payments else nothing,
            thresholds if has_payments else nothing,
        )


def add_evaluation(run: Run, folder: Path) -> dict[str, Any]:
    """Scores beside the answers and metrics of them, with hostile names; the metrics."""
    for file in sorted(folder.glob("part-*.parquet")):
        table = pq.read_table(file, columns=["row_id", "variant", "sample"])
        scores = pa.array([float(at) for at in range(table.num_rows)])
        (folder / "_scores").mkdir(exist_ok=True)
        pq.write_table(table.append_column("vader", scores), folder / "_scores" / file.name)
    metrics = metrics_of(run)
    (folder / "_metrics.json").write_text(json.dumps(metrics))
    return metrics


def metrics_of(run: Run) -> dict[str, Any]:
    names = ["vader", ATTACK]
    points = []
    for index, variant in enumerate(run.plan.variants):
        means = {"vader": math.cos(index), ATTACK: math.sin(index)}
        point = {
            "rule": str(variant.rule),
            "agent_temperature": variant.agent_temperature,
            "weights": dict(variant.weights or {}),
            "variant": index,
            "n": 6,
            "objectives": means,
            "intervals": {name: [mean - 0.1, mean + 0.1] for name, mean in means.items()},
            "kl_per_token": index / 10,
            "num_tokens": 20.0,
            "worst_principal": -1.0,
            "scores": {"words": 10.0 + index},
            "score_intervals": {"words": [9.0 + index, 11.0 + index]},
        }
        points.append(point)
    rules = list(dict.fromkeys(point["rule"] for point in points))
    return {
        "reference_point": {"vader": -1.5, ATTACK: -1.25},
        "objectives": names,
        "points": points,
        "rules": {
            rule: {"hypervolume": 1.5 + at, "hypervolume_interval": [1.25, 9.75]} for at, rule in enumerate(rules)
        },
        "differences": [
            {"rule": "equilibrium", "against": against, "metric": metric, "agent_temperature": temperature}
            | {"difference": -0.25, "interval": [-0.5, 0.125]}
            for against in ("linear", "base")
            for metric in ("hypervolume", ATTACK)
            for temperature in (0.1, 0.5, None)
        ],
        "reading": [f"by hypervolume nothing is distinguishable {ATTACK}"],
        "normalised_from": {"vader": [0.0, 1.0]},
        "by_temperature": [
            {"rule": rule, "agent_temperature": 0.1, "hypervolume": 2.0, "mip": 0.5} for rule in rules
        ],
        "control": [
            {"rule": rules[0], "principal": "brief", "objective": "vader", "spearman": 0.9, "is_monotone": True}
        ],
        "equal_kl": [{"rule": rules[0], "kl_per_token": 0.5, "vader": 0.25}],
        "win_rates": [
            {"rule": "equilibrium", "against": "linear", "objective": ATTACK, "wins": 3, "ties": 1, "losses": 2}
        ],
        "notes": [f"a note {ATTACK}"],
        "judges": {"vader": {"kind": "vader", "why": ATTACK, "measures": [ATTACK]}},
        "bootstrap": {"resamples": 100, "level": 0.95},
    }
