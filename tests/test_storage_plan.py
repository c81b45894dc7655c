"""A plan: shards that cover every row once, and a fingerprint of everything that changes results."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.storage import MODELS, make_config, small_plan, write_jsonl

from pipeline.config.files import parse_config
from pipeline.errors import ConfigurationError, RunMismatch
from pipeline.storage.plan import Plan, explain_mismatch, make_plan
from pipeline.storage.run import Run
from pipeline.stores.store import open_store


@given(
    sizes=st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=4),
    rows_per_shard=st.integers(1, 9),
    limit=st.none() | st.integers(1, 30),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_shards_cover_every_row_once_in_order(
    tmp_path: Path, sizes: list[tuple[int, bool]], rows_per_shard: int, limit: int | None
) -> None:
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    expected = []
    for number, (size, is_parquet) in enumerate(sizes):
        prompts = [f"{number}-{index}" for index in range(size)]
        if is_parquet:
            pq.write_table(pa.table({"prompt": pa.array(prompts, pa.string())}), folder / f"{number}.parquet")
        else:
            write_jsonl(folder / f"{number}.jsonl", ({"prompt": prompt} for prompt in prompts))
        expected += prompts
    config = make_config(folder, input={"limit": limit}, output={"rows_per_shard": rows_per_shard})
    expected = expected[:limit]
    if not expected:
        with pytest.raises(ConfigurationError, match="holds no rows"):
            make_plan(config)
        return
    plan = Plan.from_json(make_plan(config).to_json())
    shards = [[row.messages[0]["content"] for row in plan.read_shard(shard)] for shard in plan.shards]
    assert [prompt for shard in shards for prompt in shard] == expected
    assert all(
        1 <= len(rows) == shard.num_rows <= rows_per_shard for rows, shard in zip(shards, plan.shards, strict=True)
    )
    assert all(len({prompt.split("-")[0] for prompt in shard}) == 1 for shard in shards)
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    assert plan.num_rows == len(expected)


def test_a_plan_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    assert (plan.num_rows, len(plan.shards), plan.num_samples) == (7, 3, 1)
    assert plan.principal_names == ("brief", "kind-1")


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": {"replicas": 3, "slots": 4, "transport": "local"}},
        {"cluster": {"replicas": {"min": 1, "max": 3}}},
        {"errors": {"budget": 7, "max_attempts": 9}},
        {"output": {"path": "elsewhere"}},
        {"base": {"model": "smollm2-135m", "device": "cuda", "resources": {"num_gpus": 1, "num_cpus": 4}}},
    ],
    ids=str,
)
def test_what_cannot_change_results_is_outside_of_the_fingerprint(tmp_path: Path, change: dict[str, Any]) -> None:
    assert small_plan(tmp_path, **change).digest == small_plan(tmp_path).digest


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"decoding": {"seed": 1}}, "decoding.seed: 0 -> 1"),
        ({"decoding": {"rule": "linear"}}, "decoding.rule: 'equilibrium' -> 'linear'"),
        ({"decoding": {"agent_temperature": 0.2}}, "decoding.agent_temperature: 0.1 -> 0.2"),
        ({"decoding": {"stop": ["\n"]}}, "decoding.stop: [] -> ['\\n']"),
        ({"decoding": {"n": 2}}, "decoding.n: 1 -> 2"),
        ({"decoding": {"trace": "tokens"}}, "decoding.trace: 'summary' -> 'tokens'"),
        ({"base": {"model": "smollm2-135m", "dtype": "bfloat16"}}, "base.dtype: 'auto' -> 'bfloat16'"),
        ({"base": {"model": "smollm2-135m", "chat_template": "{{ 1 }}"}}, "base.chat_template: None -> '{{ 1 }}'"),
        ({"output": {"rows_per_shard": 4}}, "output.rows_per_shard: 3 -> 4"),
        ({"input": {"limit": 7}}, "input.limit: None -> 7"),
        ({"input": {"prompt": "prompt"}}, "input.prompt: None -> 'prompt'"),
        (
            {"principals": {"brief": {"kind": "prompted", "principle": "be brief"}}},
            "principals.kind-1.weight: 1.0 -> absent",
        ),
    ],
)
def test_what_changes_results_changes_the_fingerprint_and_is_named(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    old, new = small_plan(tmp_path), small_plan(tmp_path, **change)
    assert old.digest != new.digest
    assert field in explain_mismatch(old.fingerprint, new.fingerprint).splitlines()


def test_the_order_of_principals_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x"}]), tmp_path / "run")
    turned = config.model_copy(update={"principals": dict(reversed(config.principals.items()))})
    assert make_plan(config).digest != make_plan(turned).digest


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_content_of_the_input_is_in_the_fingerprint_and_its_place_is_not(tmp_path: Path, suffix: str) -> None:
    def plan_of(folder: str, third: str) -> Plan:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / f"x{suffix}"
        prompts = ["a", "b", third, "d"]
        if suffix == ".parquet":
            pq.write_table(pa.table({"prompt": prompts}), path)
        else:
            write_jsonl(path, ({"prompt": prompt} for prompt in prompts))
        return make_plan(make_config(path))

    first, moved, edited = plan_of("1", "c"), plan_of("2", "c"), plan_of("3", "C")
    assert first.digest == moved.digest
    assert first.files != moved.files
    assert f"input.files.x{suffix}: " in explain_mismatch(first.fingerprint, edited.fingerprint)


def test_a_model_is_what_its_identity_says_wherever_it_lies(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x"}])
    principals = {"p": {"kind": "arm", "model": "/a/arm", "adapter": "/a/lora", "reference": "backbone"}}
    moved = {"p": {"kind": "arm", "model": "/b/arm", "adapter": "/b/lora", "reference": "backbone"}}
    places = {"base": "sha256:1", "principals.p.model": "sha256:2", "principals.p.adapter": "sha256:3"}

    def plan(principals: dict[str, Any], models: dict[str, str], base: str = "/a/base") -> Plan:
        return make_plan(make_config(path, tmp_path / "run", principals=principals, base=base), models)

    first = plan(principals, places)
    assert plan(moved, places, "/b/base").digest == first.digest
    retrained = plan(principals, {**places, "principals.p.adapter": "sha256:4"})
    difference = explain_mismatch(first.fingerprint, retrained.fingerprint)
    assert difference == "models.principals.p.adapter: 'sha256:3' -> 'sha256:4'"
    without = plan(principals, {})
    assert without.fingerprint["base.model"] == "/a/base"
    assert without.fingerprint["principals.p.adapter"] == "/a/lora"
    other_reference = {"p": {**principals["p"], "reference": "none"}}
    assert plan(other_reference, places).digest != first.digest


def test_versions_hold_a_run_when_they_are_given(tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x"}]), tmp_path / "run")
    old, new = (make_plan(config, MODELS, versions={"torch": version}) for version in ("2.12", "2.13"))
    assert explain_mismatch(old.fingerprint, new.fingerprint) == "versions.torch: '2.12' -> '2.13'"
    assert "code.version" in old.fingerprint


def test_another_fingerprint_is_refused_with_the_difference_and_a_hint(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"))
    Run.create_or_resume(store, small_plan(tmp_path))
    with pytest.raises(RunMismatch) as refused:
        Run.create_or_resume(store, small_plan(tmp_path, decoding={"seed": 5}))
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{tmp_path / 'run'} holds a run with other settings (stored -> given):"
    assert lines[1:-1] == ["decoding.seed: 0 -> 5"]
    assert "another output.path" in lines[-1]


@given(data=st.binary(max_size=60), at=st.floats(0, 1))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_plan_is_reported_in_one_line(tmp_path: Path, data: bytes, at: float) -> None:
    good = small_plan(tmp_path).to_json()
    position = int(at * len(good))
    for damaged in (data, good[:position], good[:position] + data + good[position:]):
        outcome = digest_or_message(damaged, source="x/plan.json")
        is_one_line = outcome.startswith("x/plan.json") and outcome.isprintable()
        assert is_one_line or outcome == json.loads(good)["digest"]


def digest_or_message(data: bytes, *, source: str) -> str:
    try:
        return Plan.from_json(data, source=source).digest
    except ConfigurationError as refused:
        return str(refused)


def test_a_plan_of_another_version_is_refused(tmp_path: Path) -> None:
    tree = {**json.loads(small_plan(tmp_path).to_json()), "version": 99}
    with pytest.raises(ConfigurationError, match="has version 99; this program reads version 2"):
        Plan.from_json(json.dumps(tree).encode())


def test_the_run_directory_is_not_the_input_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x"}])
    with pytest.raises(ConfigurationError, match="must differ"):
        make_plan(make_config(tmp_path, f"{tmp_path}/./"))


def test_the_plan_holds_no_prompt_and_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("HF_TOKEN", "planted-secret")
    stored = small_plan(tmp_path).to_json()
    assert b"planted-secret" not in stored
    assert b"question" not in stored


def test_a_configuration_can_be_read_back_from_a_plan(tmp_path: Path) -> None:
    config = make_config(write_jsonl(tmp_path / "x.jsonl", [{"prompt": "x"}]), tmp_path / "run")
    assert parse_config(dict(Plan.from_json(make_plan(config).to_json()).config)) == config


@pytest.mark.slow
def test_planning_takes_memory_for_its_shards_not_for_its_rows(tmp_path: Path) -> None:
    """A tenth of the stated size (1,000,000 rows): 8 bytes a row with an id column, nothing a row without."""
    path = write_jsonl(tmp_path / "x.jsonl", ({"id": index, "prompt": "x" * 200} for index in range(100_000)))
    for id_column, limit_bytes in ((None, 3_000_000), ("id", 8_000_000)):
        config = make_config(path, input={"id": id_column}, output={"rows_per_shard": 250})
        make_plan(config)
        tracemalloc.start()
        plan = make_plan(config)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(plan.shards) == 400
        assert peak < limit_bytes
