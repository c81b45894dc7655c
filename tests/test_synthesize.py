"""`cage synthesize` from a prompts file to a data set that TRL trains on, with a tiny model in one process."""

from __future__ import annotations

import io
import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset, load_from_disk
from support.commands import cage
from support.failpoints import watched
from support.judge_models import save_reward_model
from support.storage import tree_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.commands.synthesize import run_synthesize
from pipeline.config.files import dump_config, load_as, parse_as
from pipeline.errors import ConfigurationError
from pipeline.stages.relabel import relabel
from pipeline.stages.retry import Retry, retry
from pipeline.stages.synthesize import synthesize
from pipeline.synthesis.settings import SynthesizeConfig

PRINCIPALS = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
FILTERS = {"finish_reasons": ["stop", "length"], "duplicates": {"near": 0.9}}


def job_tree(folder, base, **sections):
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        rows = [{"id": f"r{at}", "prompt": "tell me " * (at % 4) + "x" * (at + 1)} for at in range(10)]
        rows[4]["prompt"] = None
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "input": {"path": str(prompts), "id": "id"},
        "output": {"path": str(folder / "run"), "rows_per_shard": 4},
        "base": str(base),
        "principals": PRINCIPALS,
        "decoding": {"max_new_tokens": 6, "n": 3, "agent_temperature": 0.5},
        "grid": {"weights": [{"kind": 1, "brief": 0}, {"kind": 0.5, "brief": 0.5}]},
        "cluster": {"transport": "local", "slots": 8},
        "errors": {"budget": "100%"},
        "synthesis": {"filters": FILTERS, "validation": 0.3, "rows_per_file": 20},
        **sections,
    }


def run_job(tree, folder, **options):
    return synthesize(parse_as(SynthesizeConfig, tree), folder / "cache", io.StringIO(), **options)


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A finished job and its folder."""
    folder = tmp_path_factory.mktemp("synthesize")
    dataset, was_decoded = run_job(job_tree(folder, tiny()), folder)
    assert was_decoded
    assert dataset.was_made
    return folder, dataset


def test_a_prompts_file_becomes_both_kinds_of_data(made):
    folder, dataset = made
    manifest = dataset.manifest
    assert manifest["answers"] == 9 * 2 * 3
    assert manifest["answers_failed_in_the_run"] == 6
    for kind in ("sft", "preferences"):
        assert manifest[kind]["answers_used"] + sum(manifest[kind]["answers_dropped"].values()) == 54
        assert all(manifest[kind]["rows"].values())
    parts = [pq.read_table(path).to_pylist() for path in sorted((folder / "run").glob("part-*.parquet"))]
    stored = {(row["row_id"], row["variant"], row["sample"]): row for rows in parts for row in rows}
    rows = load_dataset(str(folder / "run/_dataset"), "sft", split="train", cache_dir=str(folder / "hf"))
    for row in rows:
        source = stored[row["row_id"], row["variant"], row["sample"]]
        assert row["messages"] == source["messages"]
        assert row["rewards"] == source["rewards"]


def test_the_same_command_does_nothing_and_other_settings_decode_nothing(made, tiny):
    folder, dataset = made
    before = tree_bytes(folder / "run", "**/*.*")
    tree = job_tree(folder, tiny())
    again, was_decoded = run_job(tree, folder)
    assert (was_decoded, again.was_made, again.manifest) == (False, False, dataset.manifest)
    other, was_decoded = run_job({**tree, "synthesis": {**tree["synthesis"], "seed": 3}}, folder)
    assert (was_decoded, other.was_made) == (False, True)
    assert tree_bytes(folder / "run", "**/*.*") != before
    run_job(tree, folder)
    assert tree_bytes(folder / "run", "**/*.*") == before


def test_a_new_run_begins_beside_one_of_other_answers(made, tiny):
    folder, dataset = made
    tree = job_tree(folder, tiny(), input={"path": str(folder / "prompts.jsonl"), "id": "id", "limit": 2})
    with pytest.raises(ConfigurationError, match=r"input\.limit"):
        run_job(tree, folder)
    beside, _ = run_job(tree, folder, may_begin_beside=True)
    assert beside.run.store.path == dataset.run.store.path + "-2"
    assert beside.manifest["answers"] == 12
    again, was_run = run_job(tree, folder, may_begin_beside=True)
    assert (was_run, again.was_made, again.manifest) == (False, False, beside.manifest)


def test_the_run_is_that_of_relabel_and_can_be_retried(made, tiny):
    folder, dataset = made
    config = parse_as(SynthesizeConfig, job_tree(folder, tiny()))
    assert "synthesis" not in dataset.run.plan.config
    run, was_run = relabel(config.job, folder / "cache", io.StringIO())
    assert not was_run
    assert run.plan == dataset.run.plan
    with pytest.raises(ConfigurationError, match="no failed row that can be tried again"):
        retry(Retry(str(folder / "run")), folder / "cache", io.StringIO())


def test_a_reward_model_ranks_the_answers_and_is_named_in_the_card(made, tiny, tmp_path):
    folder, _ = made
    model = save_reward_model(tmp_path / "rm")
    settings = {"judges": {"rm": {"kind": "reward_model", "model": str(model)}}, "score": "rm"}
    copied = tmp_path / "run"
    shutil.copytree(folder / "run", copied, ignore=shutil.ignore_patterns("_dataset"))
    tree = job_tree(folder, tiny(), synthesis={"filters": FILTERS, "validation": 0.3, **settings})
    tree["output"]["path"] = str(copied)
    dataset, was_run = run_job(tree, folder)
    assert was_run
    scored = pq.read_table(sorted((copied / "_scores").glob("*.parquet"))).to_pylist()
    score_of = {(row["row_id"], row["variant"], row["sample"]): row["rm"] for row in scored}
    pairs = load_dataset(str(copied / "_dataset"), "preferences", split="train", cache_dir=str(tmp_path / "hf"))
    for row in pairs:
        for side in ("chosen", "rejected"):
            assert row[f"score_{side}"] == score_of[row["row_id"], row[f"variant_{side}"], row[f"sample_{side}"]]
        assert row["margin"] > 0
    assert "synthesis.judges.rm" in (copied / "_dataset/README.md").read_text()
    again, was_run = run_job(tree, folder)
    assert (was_run, again.was_made) == (False, False)
    assert dataset.manifest == again.manifest


class Killed(Exception):
    pass


def test_a_job_that_was_killed_while_it_decoded_ends_with_the_same_data_set(made, tiny, tmp_path):
    folder, _ = made
    (tmp_path / "prompts.jsonl").write_bytes((folder / "prompts.jsonl").read_bytes())
    names: list[object] = []

    def kill(point, name):
        names.append(name)
        if len(names) == 4:
            raise Killed

    with pytest.raises(Killed):
        run_job(job_tree(tmp_path, tiny()), tmp_path, wiring=watched(kill))
    assert not (tmp_path / "run/_dataset").exists()
    run_job(job_tree(tmp_path, tiny()), tmp_path)
    assert tree_bytes(tmp_path / "run/_dataset", "**/*.*") == tree_bytes(folder / "run/_dataset", "**/*.*")


def test_the_command_says_what_it_made_and_exports_it(tiny, tmp_path, capfd):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job_tree(tmp_path, tiny())))
    target = tmp_path / "exported"
    done = cage("synthesize", "-c", str(file), "--export", str(target))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "run/_dataset/manifest.json").read_text())
    rows = manifest["sft"]["rows"]
    assert f"{rows['train']} train, {rows['validation']} validation rows" in done.stdout
    assert "54 looked at" in done.stdout
    for reason, count in manifest["preferences"]["answers_dropped"].items():
        assert any(reason in line and line.split()[-1] == str(count) for line in done.stdout.splitlines())
    assert f'datasets.load_dataset("{tmp_path}/run/_dataset", "sft")' in done.stdout
    for kind in ("sft", "preferences"):
        exported = load_from_disk(str(target / kind))
        assert {split: len(each) for split, each in exported.items()} == manifest[kind]["rows"]
        original = load_dataset(str(tmp_path / "run/_dataset"), kind, cache_dir=str(tmp_path / "hf"))
        assert exported["train"].to_list() == original["train"].to_list()

    run_synthesize(file, [], export_to=target)
    shown = capfd.readouterr().out
    assert "nothing to do" in shown
    assert "(was there)" in shown
    with pytest.raises(ConfigurationError, match="holds other files"):
        run_synthesize(file, [], export_to=tmp_path / "run/_dataset")
    assert (tmp_path / "run/_dataset/manifest.json").exists()
    with pytest.raises(ConfigurationError, match="export of another data set"):
        run_synthesize(file, ["synthesis.seed=5"], export_to=target)


def test_print_config_shows_every_default_and_loads_again(tiny, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job_tree(tmp_path, tiny())))
    run_synthesize(file, ["synthesis.seed=9"], print_config=True)
    printed = capsys.readouterr().out
    file.write_text(printed)
    config = load_as(SynthesizeConfig, file)
    assert dump_config(config) == printed
    assert (config.synthesis.seed, config.synthesis.pairs.max_pairs) == (9, 8)
    assert not (tmp_path / "run").exists()


WRONG = [
    ("filters.min_reward.kind=1", "filters.min_reward is not a known key; did you mean min_rewards"),
    ("filters.min_rewards.nice=1", "synthesis.filters.min_rewards.nice: 'nice' is unknown; known: brief, kind"),
    ("filters.judges.tone.min=1", "filters.judges.tone: 'tone' is unknown; known: none"),
    ("score=tone", "score: 'tone' is unknown; known: reward, reward_per_token"),
    ("write=dpo", "synthesis.write.0 must be 'sft' or 'preferences'; got 'dpo'"),
    ("write=[]", "synthesis.write has too few entries"),
    ("validation=1", "synthesis.validation must be less than 1; got 1"),
    ("filters.duplicates.near=80", "filters.duplicates.near must be less than or equal to 1; got 80"),
    (
        "judges.reward.kind=length",
        "a judge's name has letters, digits, _ and -, starts with a letter and is none of reward,",
    ),
    ("judges.own={kind: principal, principal: x}", "synthesis.judges.own.principal: 'x' is unknown"),
    ("judges.own.kind=longness", "synthesis.judges.own.kind must be one of sentiment"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_setting_is_reported_before_anything_runs(tmp_path, change, message):
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job_tree(tmp_path, "nowhere")))
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load_as(SynthesizeConfig, file, [f"synthesis.{change}"])


def test_a_licence_of_what_is_not_used_is_reported(tmp_path):
    tree = job_tree(tmp_path, "nowhere")
    tree["synthesis"]["licences"] = {"input": "CC0", "principals.kind.model": "MIT"}
    with pytest.raises(ConfigurationError, match=r"licences.principals.kind.model: .* it uses input, base$"):
        run_job(tree, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("decoding.n=1", "set decoding.n to 2 or more, or synthesis.write to sft"),
        ("decoding.temperature=0", "decoding.temperature is 0, so that all answers to a prompt are equal"),
    ],
)
def test_pairs_that_can_never_be_made_are_reported(tmp_path, change, message):
    tree = job_tree(tmp_path, "nowhere")
    with pytest.raises(ConfigurationError, match=message):
        parse_as(SynthesizeConfig, tree, [change])
    assert parse_as(SynthesizeConfig, tree, [change, "synthesis.write=sft"])
    two_rules = [change, "grid.rules=[linear, equilibrium]"]
    assert parse_as(SynthesizeConfig, tree, two_rules).decoding


def test_rewards_rank_nothing_where_there_are_no_principals(tmp_path):
    tree = job_tree(tmp_path, "nowhere", principals={}, grid={})
    with pytest.raises(ConfigurationError, match="score: reward needs principals, and there are none; name a judge"):
        parse_as(SynthesizeConfig, tree)
    assert parse_as(SynthesizeConfig, {**tree, "synthesis": {"write": "sft"}}).synthesis.is_ranked is False


def trainer_options(folder):
    return {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [],
        "use_cpu": True, "bf16": False, "save_strategy": "no", "max_length": 64, "disable_tqdm": True,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "preferences"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trl_trains_on_it_as_it_is(made, tiny, tmp_path, kind):
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    folder, _ = made
    rows = load_dataset(str(folder / "run/_dataset"), kind, cache_dir=str(folder / "hf"))
    config, trainer = (SFTConfig, SFTTrainer) if kind == "sft" else (DPOConfig, DPOTrainer)
    training = trainer(
        AutoModelForCausalLM.from_pretrained(tiny()),
        args=config(**trainer_options(tmp_path)),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=AutoTokenizer.from_pretrained(tiny()),
    )
    assert training.train().global_step == 1
    assert training.evaluate()["eval_loss"] > 0
