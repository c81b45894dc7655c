"""Variants: one run answers every prompt under several rules, agent temperatures and weights."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.decoding import ask, config_of, decode, engine_of

from pipeline.config.files import parse_config
from pipeline.config.sections import RuleName
from pipeline.config.variants import lay_out
from pipeline.engine.engine import decode_rows
from pipeline.errors import ConfigurationError
from pipeline.stages.relabel import relabel
from pipeline.storage.run import Run

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
DECODING = {"max_new_tokens": 6, "trace": "tokens"}
CLUSTER = {"transport": "local", "slots": 7}
PLAYED = [rule for rule in RuleName if rule.serves_tokens and not rule.at_weights]
GRID = {
    "rules": [str(rule) for rule in PLAYED],
    "agent_temperatures": [0.2, 1.0],
    "weights": [{"kind": 1.0, "brief": 0.0}, {"brief": 0.6, "kind": 0.4}],
}


def test_the_grid_is_laid_out_once_each_and_the_base_alone():
    variants = lay_out(config_of("m", PAIR, grid=GRID))
    assert len(variants) == sum(rule.uses_principals for rule in PLAYED) * 2 * 2 + 1
    assert len({repr(variant) for variant in variants}) == len(variants)
    assert sum(variant.rule is RuleName.BASE for variant in variants) == 1
    assert variants[1].weights == {"kind": 0.4, "brief": 0.6}


@pytest.mark.parametrize(
    ("num_principals", "step", "expected"), [(1, 0.25, 1), (2, 0.25, 5), (3, 0.5, 6), (4, 0.1, 286)]
)
def test_a_simplex_holds_every_vector_that_sums_to_one(num_principals, step, expected):
    principals = {f"p{at}": {"kind": "prompted", "principle": "x"} for at in range(num_principals)}
    variants = lay_out(config_of("m", principals, grid={"weights": {"step": step}}))
    vectors = [tuple(variant.weights.values()) for variant in variants]
    assert len(set(vectors)) == expected
    assert all(sum(vector) == pytest.approx(1.0) for vector in vectors)
    assert vectors[0][0] == 1.0


def test_variants_that_share_batches_equal_runs_of_their_own(tiny):
    rows = [ask(f"r{at}", "tell me " * at) for at in range(1, 4)]
    config = config_of(tiny(), PAIR, decoding=DECODING, cluster=CLUSTER, grid=GRID)
    variants = lay_out(config)
    engine, _ = engine_of(config)
    together = {(r.row_id, r.variant): r for r in decode_rows(engine, rows, num_variants=len(variants))}
    assert len(together) == len(rows) * len(variants)
    texts = set()
    for index, variant in enumerate(variants):
        principals = {name: {**PAIR[name], "weight": variant.weights[name]} for name in PAIR}
        decoding = {**DECODING, "rule": str(variant.rule), "agent_temperature": variant.agent_temperature}
        alone = decode(config_of(tiny(), principals, decoding=decoding, cluster=CLUSTER), rows)
        for row in rows:
            record = together[row.row_id, index]
            assert record.tokens == alone[row.row_id].tokens
            assert record.rewards == alone[row.row_id].rewards
            assert record.payments == alone[row.row_id].payments
            assert (record.rule, record.agent_temperature) == (str(variant.rule), variant.agent_temperature)
            assert dict(record.weights) == variant.weights
            texts.add((row.row_id, record.response))
    assert len(texts) > len(rows)


def grid_run(tiny, tmp_path: Path, **sections):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": "a", "prompt": "hello"}, {"id": "b", "prompt": None}, {"id": "c", "prompt": "world"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse_config(
        {
            "input": {"path": str(prompts), "id": "id"},
            "output": {"path": str(tmp_path / "run"), "rows_per_shard": 2},
            "base": str(tiny()),
            "principals": PAIR,
            "decoding": {"max_new_tokens": 4, "n": 2},
            "grid": {"rules": ["base", "linear"], "agent_temperatures": [0.5, 1.0]},
            "cluster": {"transport": "local", "slots": 3},
            "errors": {"budget": "100%"},
            **sections,
        }
    )
    return relabel(config, tmp_path / "cache", io.StringIO())


def test_files_name_each_answer_by_row_variant_and_sample(tiny, tmp_path):
    run, was_run = grid_run(tiny, tmp_path)
    assert was_run
    table = pq.read_table(sorted((tmp_path / "run").glob("part-*.parquet")))
    keys = list(zip(*(table[name].to_pylist() for name in ("row_id", "variant", "sample")), strict=True))
    assert keys == [(row, variant, sample) for row in "ac" for variant in range(3) for sample in range(2)]
    names = ("variant", "rule", "agent_temperature")
    named = set(zip(*(table[name].to_pylist() for name in names), strict=True))
    assert named == {(0, "base", 0.5), (1, "linear", 0.5), (2, "linear", 1.0)}
    status = run.status()
    assert (status.num_rows, status.rows_aligned, status.rows_failed) == (18, 12, 6)
    assert [(row["variant"], row["sample"]) for row in run.find("c")] == [(v, s) for v in range(3) for s in range(2)]
    assert Run.open(str(tmp_path / "run")).plan == run.plan
    assert grid_run(tiny, tmp_path)[1] is False


def test_another_grid_is_another_run(tiny, tmp_path):
    grid_run(tiny, tmp_path)
    with pytest.raises(ConfigurationError, match=r"grid\.rules"):
        grid_run(tiny, tmp_path, grid={"rules": ["linear"]})


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"weights": [{"kind": 1}]}, r"grid.weights\[0\] must name every principal once \(kind, brief\); got kind"),
        ({"weights": {"step": 0.3}}, "1 must be a multiple of step; got 0.3"),
        ({"weights": {"step": 0}}, "grid.weights.step must be greater than 0"),
        ({"weights": [{"kind": -1, "brief": 1}]}, r"grid.weights.0.kind must be greater than or equal to 0; got -1"),
        ({"rules": ["best"]}, "grid.rules.0 must be 'equilibrium', 'linear'"),
        ({"temperatures": [1]}, "grid.temperatures is not a known key; did you mean (agent|draw)_temperatures"),
        ({"agent_temperatures": [0]}, "grid.agent_temperatures.0 must be greater than 0; got 0"),
    ],
)
def test_a_wrong_grid_is_told(grid, message):
    with pytest.raises(ConfigurationError, match=message):
        config_of("m", PAIR, grid=grid)


def test_weights_come_from_the_input_or_from_the_grid():
    sections = {"input": {"path": "x.jsonl", "weights": "w"}, "grid": {"weights": {"step": 0.5}}}
    with pytest.raises(ConfigurationError, match=r"either input.weights or grid.weights"):
        config_of("m", PAIR, **sections)
