"""Games over tokens, blocks and answers in one run, and PARM beside CAGE+: each as in a run of its own."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from support.decoding import NOWHERE, ask, config_of, decode
from support.preference_adapters import make_preference_adapter

from pipeline.config.files import parse_as
from pipeline.config.variants import lay_out, names_of
from pipeline.engine.engine import decode_rows
from pipeline.errors import ConfigurationError, HostError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.reporting.page import render_report
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_decoding_engine
from pipeline.runtime.local_hosts import start_hosts
from pipeline.stages.evaluate import evaluate

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
GRID = {
    "rules": ["equilibrium", "linear", "best_of_n", "base"],
    "units": ["token", "block", "answer"],
    "weights": [{"kind": 0.7, "brief": 0.3}, {"kind": 0.2, "brief": 0.8}],
}
DECODING = {"max_new_tokens": 6, "proposals": 4, "block_tokens": 3, "agent_temperature": 0.4, "trace": "tokens"}
ROWS = [ask(f"r{at}", "tell me " * at) for at in range(1, 4)]


def decode_all(config, *, breaks_at=()):
    assembly = assemble(config, NOWHERE)
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    if not breaks_at:
        records = list(decode_rows(engine, ROWS, num_variants=len(assembly.variants)))
    else:
        for row in ROWS:
            for variant in range(len(assembly.variants)):
                engine.admit(row, variant)
        records, steps = [], 0
        while not engine.is_idle:
            records += engine.step()
            steps += 1
            if steps in breaks_at:
                engine.recover(start_hosts(assembly), HostError("gone"))
    return {(record.row_id, record.variant): record for record in records}


def alone(config, **decoding):
    """Records of a run with one variant."""
    assembly = assemble(config, NOWHERE)
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    return {record.row_id: record for record in decode_rows(engine, ROWS)}


def test_a_rule_is_played_over_every_unit_that_it_is_for():
    names = names_of(lay_out(config_of("m", PAIR, grid=GRID, decoding=DECODING)))
    assert list(dict.fromkeys(names)) == [
        "equilibrium", "equilibrium (block)", "equilibrium (answer)",
        "linear", "linear (block)", "linear (answer)", "best_of_n (block)", "best_of_n (answer)", "base",
    ]  # fmt: skip
    assert names.count("base") == 1
    assert names.count("best_of_n (answer)") == 2  # one for each weight vector, whatever the agent temperatures
    only = config_of("m", PAIR, grid={"rules": ["linear"], "units": ["answer"], "agent_temperatures": [1, 2]})
    assert names_of(lay_out(only)) == ("linear", "linear")


def test_units_that_share_a_run_equal_runs_of_their_own(tiny):
    decoding = {**DECODING, "temperature": 0.5, "top_p": 0.9}
    config = config_of(tiny(), PAIR, decoding=decoding, grid=GRID, cluster={"slots": 5})
    together = decode_all(config)
    variants = lay_out(config)
    assert len(together) == len(ROWS) * len(variants)
    for index, variant in enumerate(variants):
        principals = {name: {**PAIR[name], "weight": variant.weights[name]} for name in PAIR}
        own = {**decoding, "unit": str(variant.unit), "rule": str(variant.rule)}
        unused = {"token": ("proposals", "block_tokens"), "block": (), "answer": ("block_tokens",)}[variant.unit]
        own = {key: value for key, value in own.items() if key not in unused}
        records = alone(config_of(tiny(), principals, decoding=own, cluster={"slots": 3}))
        for row in ROWS:
            found = together[row.row_id, index]
            assert found.error is None
            assert replace(found, variant=0) == records[row.row_id]
            assert found.unit == variant.unit
            assert bool(found.proposals) == (variant.unit != "token")


def test_lost_hosts_and_slots_change_no_answer_of_any_unit(tiny):
    grid = {**GRID, "rules": ["equilibrium"], "weights": GRID["weights"][:1]}
    config, lone = (
        config_of(tiny(), PAIR, decoding=DECODING, grid=grid, cluster={"slots": slots}) for slots in (7, 1)
    )
    calm = decode_all(config)
    assert decode_all(config, breaks_at=(2, 9)) == calm
    assert decode_all(lone) == calm


def test_best_of_n_takes_the_proposal_with_the_highest_weighted_reward(tiny):
    config = config_of(tiny(), PAIR, decoding=DECODING, grid=GRID)
    variants = lay_out(config)
    names = names_of(variants)
    num_better = 0
    for (_, index), record in decode_all(config).items():
        if names[index] != "best_of_n (answer)":
            continue
        weights = variants[index].weights
        totals = [sum(weights[name] * each.rewards[name] for name in PAIR) for each in record.proposals]
        chosen = next(at for at, each in enumerate(record.proposals) if each.is_chosen)
        assert totals[chosen] == max(totals)
        assert record.proposals[chosen].probability == 1.0
        num_better += min(totals) < max(totals)
    assert num_better


def test_the_temperature_of_the_draw_is_a_way_to_answer(tiny):
    grid = {"rules": ["linear", "base"], "draw_temperatures": [0, 1.5], "units": ["token", "answer"]}
    decoding = {key: value for key, value in DECODING.items() if key != "block_tokens"}
    config = config_of(tiny(), PAIR, decoding=decoding, grid=grid)
    variants = lay_out(config)
    assert list(dict.fromkeys(names_of(variants))) == [
        "linear (greedy)", "linear (temperature 1.5)", "linear (answer, greedy)", "linear (answer, temperature 1.5)",
        "base (greedy)", "base (temperature 1.5)",
    ]  # fmt: skip
    together = decode_all(config)
    for index, variant in enumerate(variants):
        own = {**decoding, "unit": str(variant.unit), "rule": str(variant.rule), "temperature": variant.temperature}
        own = {key: value for key, value in own.items() if variant.unit == "answer" or key != "proposals"}
        records = alone(config_of(tiny(), PAIR, decoding=own))
        assert all(replace(together[row.row_id, index], variant=0) == records[row.row_id] for row in ROWS)
        assert all(together[row.row_id, index].temperature == variant.temperature for row in ROWS)


JUDGED = {"long": {"kind": "judge", "judge": {"kind": "length"}}, **PAIR}
RM = {"safe": {"kind": "preference_arm", "adapter": "x", "objective": 0}}


@pytest.mark.parametrize(
    ("principals", "sections", "message"),
    [
        (
            JUDGED,
            {"grid": {"units": ["token", "answer"]}},
            r"principals\.long: a judge values text and no tokens; choose grid\.units: block or answer; got token",
        ),
        (PAIR, {"grid": {"rules": ["best_of_n"]}}, r"grid\.rules: best_of_n chooses among blocks or answers"),
        (PAIR, {"decoding": {"rule": "best_of_n"}}, r"decoding\.rule: best_of_n chooses among blocks or answers"),
        (RM, {"grid": {"rules": ["parm"], "units": ["answer"]}}, r"grid\.rules: parm draws tokens"),
        (PAIR, {"grid": {"rules": ["parm"]}}, r"principals\.kind is of kind prompted, and must be a preference_arm"),
        ({}, {"grid": {"rules": ["parm"]}}, "parm needs principals of kind preference_arm, and there are none"),
        (
            {**RM, "useful": {"kind": "preference_arm", "adapter": "y", "objective": 1}},
            {"decoding": {"rule": "parm"}},
            r"principals\.useful must have the adapter, model",
        ),
        (PAIR, {"decoding": {"block_tokens": 4}, "grid": {"units": ["token", "answer"]}}, r"block_tokens: no effect"),
        (PAIR, {"decoding": {"unit": "answer", "proposals_by": "best_of_n"}}, r"proposals_by: best_of_n chooses"),
        (
            PAIR,
            {"input": {"path": "x.jsonl", "candidates": "c"}, "grid": {"units": ["block", "answer"]}},
            r"input\.candidates needs unit: answer; got unit: block, answer",
        ),
        (
            PAIR,
            {"decoding": {"thinking": {"max_tokens": 3}}, "grid": {"units": ["token", "block"]}},
            r"thinking\.max_tokens need unit: token; got unit: token, block",
        ),
        (PAIR, {"grid": {"units": ["word"]}}, r"grid\.units\.0 must be 'token', 'block' or 'answer'"),
        (
            PAIR,
            {"decoding": {"target_kl": 0.1}, "grid": {"rules": ["best_of_n", "base"], "units": ["answer"]}},
            r"target_kl: no effect",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(principals, sections, message):
    with pytest.raises(ConfigurationError, match=message):
        config_of("m", principals, **sections)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return make_preference_adapter(tmp_path_factory.mktemp("parm"), tiny())


def arms(adapter, weights=None, **options):
    weights = weights or {"kind": 0.7, "brief": 0.3}
    return {
        name: {"kind": "preference_arm", "adapter": str(adapter), "objective": at, "weight": weights[name], **options}
        for at, name in enumerate(("kind", "brief"))
    }


@pytest.mark.parametrize("reference", ["backbone", pytest.param("none", marks=pytest.mark.slow)])
def test_parm_and_cage_plus_in_one_run_are_what_they_are_alone(tiny, adapter, reference):
    """PARM's answers are those of one adapter at the row's weights, added once; its rewards are the principals'."""
    vectors = [{"kind": 0.7, "brief": 0.3}, {"kind": 0.5, "brief": 1.5}]
    decoding = {"max_new_tokens": 6, "agent_temperature": 0.5, "trace": "tokens"}
    grid = {"rules": ["equilibrium", "linear", "parm", "base"], "weights": vectors}
    config = config_of(tiny(), arms(adapter, reference=reference), decoding=decoding, grid=grid, cluster={"slots": 4})
    together = decode_all(config)
    texts = set()
    for index, variant in enumerate(lay_out(config)):
        is_parm = variant.rule == "parm"
        total = sum(variant.weights.values())
        weights = {name: weight / total for name, weight in variant.weights.items()} if is_parm else variant.weights
        options = {"reference": reference, **({"preference": "weights"} if is_parm else {})}
        own = {**decoding, "rule": "linear" if is_parm else str(variant.rule)}
        records = decode(config_of(tiny(), arms(adapter, weights, **options), decoding=own), ROWS)
        for row in ROWS:
            found, expected = together[row.row_id, index], records[row.row_id]
            assert [each.token_id for each in found.tokens] == [each.token_id for each in expected.tokens]
            assert found.kl_per_token == pytest.approx(expected.kl_per_token, rel=1e-4)
            assert (found.rule, found.weights) == (str(variant.rule), variant.weights)
            if not is_parm:
                assert found.rewards == pytest.approx(expected.rewards, abs=1e-4)
            texts.add((row.row_id, found.response))
    assert len(texts) > 2 * len(ROWS)


def test_the_rewards_of_parms_answers_are_the_principals_own(tiny, adapter):
    decoding = {"max_new_tokens": 6, "agent_temperature": 0.5}
    config = config_of(tiny(), arms(adapter), decoding={**decoding, "rule": "parm"})
    assembly = assemble(config, NOWHERE)
    assert [role.name for role in assembly.hosts[0].roles] == ["base", "kind", "kind.at_weights", "brief"]
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    scorer = make_decoding_engine(assembly, start_hosts(assembly))
    for record in decode_rows(engine, ROWS):
        if record.finish_reason == "stop":
            row = next(row for row in ROWS if row.row_id == record.row_id)
            assert scorer.score(replace(row, response=record.response)) == pytest.approx(record.rewards, abs=1e-3)
        assert record.rewards["kind"] != record.rewards["brief"]


def evaluation_of(tiny, tmp_path, principals, grid, **sections):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"r{at}", "prompt": "tell me " * at}) + "\n" for at in range(1, 6)))
    tree = {
        "input": {"path": str(prompts), "id": "id"},
        "output": {"path": str(tmp_path / "run"), "rows_per_shard": 2},
        "base": str(tiny()),
        "principals": principals,
        "grid": grid,
        "cluster": {"transport": "local", "slots": 8},
        "evaluation": {
            "judges": {"words": {"kind": "length"}, "own": {"kind": "principal", "principal": "kind"}},
            "objectives": {"brief": "words", "kind": "own"},
            "bootstrap": {"samples": 100},
        },
        **sections,
    }
    return evaluate(parse_as(EvaluateConfig, tree), tmp_path / "cache", io.StringIO())


def test_an_evaluation_has_units_and_parm_side_by_side(tiny, adapter, tmp_path):
    grid = {
        "rules": ["equilibrium", "linear", "parm", "best_of_n", "base"],
        "units": ["token", "answer"],
        "agent_temperatures": [0.3, 1.0],
        "weights": {"step": 0.5},
    }
    decoding = {"max_new_tokens": 6, "proposals": 3}
    done = evaluation_of(tiny, tmp_path, arms(adapter), grid, decoding=decoding)
    metrics = done.metrics
    methods = [
        "equilibrium", "equilibrium (answer)", "linear", "linear (answer)", "parm", "best_of_n", "base",
    ]  # fmt: skip
    assert list(metrics["rules"]) == methods
    assert [metrics["rules"][name]["unit"] for name in methods] == [
        "token", "answer", "token", "answer", "token", "answer", "token",
    ]  # fmt: skip
    assert len(metrics["points"]) == 4 * 2 * 3 + 2 * 3 + 3 + 1
    rows = pq.read_table(sorted((tmp_path / "run").glob("part-*.parquet"))).to_pylist()
    for point in metrics["points"]:
        own = [row for row in rows if row["variant"] == point["variant"]]
        assert {row["game_unit"] for row in own} == {point["unit"]}
        assert all(bool(row["proposals"]) == (point["unit"] == "answer") for row in own)
    compared = {(each["rule"], each["against"], each["metric"]) for each in metrics["differences"]}
    for pair in (
        ("equilibrium", "equilibrium (answer)"),
        ("equilibrium", "parm"),
        ("equilibrium", "best_of_n"),
        ("parm", "best_of_n"),
        ("equilibrium (answer)", "best_of_n"),
    ):
        for metric in ("hypervolume", "mip", "worst_principal", "equal_length"):
            assert (*pair, metric) in compared
    assert ("equilibrium", "parm", "equal_kl") in compared
    assert ("equilibrium", "equilibrium (answer)", "equal_kl") in compared
    assert ("equilibrium", "linear (answer)", "mip") not in compared  # they differ in two things
    assert {each["unit"] for each in metrics["equal_kl"]} == {"token", "answer"}
    assert any("of one unit, and two by two across units" in note for note in metrics["notes"])
    page = render_report(done.run).decode()
    assert all(name in page for name in methods)


def test_judges_are_principals_of_blocks_and_answers_side_by_side(tiny, tmp_path):
    principals = {**PAIR, "long": {"kind": "judge", "judge": {"kind": "length"}, "scale": 0.5}}
    grid = {"rules": ["equilibrium", "best_of_n"], "units": ["block", "answer"]}
    decoding = {"max_new_tokens": 6, "proposals": 3, "block_tokens": 2}
    metrics = evaluation_of(tiny, tmp_path, principals, grid, decoding=decoding).metrics
    assert list(metrics["rules"]) == [
        "equilibrium (block)", "equilibrium (answer)", "best_of_n (block)", "best_of_n (answer)",
    ]  # fmt: skip
