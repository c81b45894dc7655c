"""Every configuration that is shipped loads, says what it is for, and asks for the hardware that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from jobs.commands.job_files import load_job
from pipeline.config.sections import Config, RuleName, Transport
from pipeline.config.variants import lay_out
from pipeline.evaluation.config import EvaluateConfig
from pipeline.runtime.topology import build_topology

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("**/*.yaml"))
FIRST_LINE = re.compile(r"# Hardware: .+; duration: .+; purpose: .+\.")
SECRET = re.compile(
    r"(?i)(?<!per_)(token|secret|password|api_key|access_key)\s*[:=]|AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}"
)

every_config = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
every_run = pytest.mark.parametrize(
    "file", [file for file in FILES if not file.stem.startswith("train")], ids=lambda file: file.stem
)


def num_gpus_of_a_replica(config: Config) -> float:
    hosts = build_topology(config).hosts
    return sum(host.model.resources.num_gpus or 0 for host in hosts if host.model.device.startswith("cuda"))


def test_there_is_a_configuration_for_each_situation() -> None:
    assert {file.stem for file in FILES} >= {
        "quickstart", "local", "do_not_answer", "weak_to_strong", "lora_adapters", "tuned_pair", "reward_model", "s3",
        "evaluate", "synthesize", "train",
    }  # fmt: skip


@every_config
def test_a_configuration_loads_and_says_what_it_is_for(file: Path) -> None:
    load_job(file)
    text = file.read_text(encoding="utf-8")
    assert FIRST_LINE.fullmatch(text.splitlines()[0])
    assert not SECRET.search(text)


@every_run
def test_a_configuration_lays_out_hosts_and_names_every_principal(file: Path) -> None:
    config = load_job(file)
    topology = build_topology(config)
    assert [principal.name for principal in topology.principals] == list(config.principals)
    assert set(topology.roles) >= {role for principal in topology.principals for role in principal.roles.values()}


@every_run
def test_a_configuration_asks_for_the_gpus_that_it_names(file: Path) -> None:
    config = load_job(file)
    named = re.search(r"(\d+) GPUs?\b", file.read_text(encoding="utf-8").splitlines()[0])
    assert num_gpus_of_a_replica(config) * config.cluster.replica_range.max == (int(named[1]) if named else 0)


def test_prompted_principals_share_the_bases_host() -> None:
    assert len(build_topology(load_job(FOLDER / "quickstart.yaml")).hosts) == 1


def test_adapters_on_the_base_share_its_host() -> None:
    [host] = build_topology(load_job(FOLDER / "lora_adapters.yaml")).hosts
    assert len(host.adapters) == 3


def test_reward_models_of_their_own_have_hosts_of_their_own() -> None:
    assert len(build_topology(load_job(FOLDER / "weak_to_strong.yaml")).hosts) == 3
    assert len(build_topology(load_job(FOLDER / "tuned_pair.yaml")).hosts) == 3


def test_one_configuration_needs_no_ray() -> None:
    assert load_job(FOLDER / "local.yaml").cluster.transport is Transport.LOCAL


def test_the_evaluation_is_judged_by_what_no_principal_is_told_to_raise() -> None:
    config = load_job(FOLDER / "evaluate.yaml")
    assert isinstance(config, EvaluateConfig)
    judges = [config.evaluation.judges[name] for name in config.objectives.values()]
    assert all(judge.measured_principal is judge.required_model is None for judge in judges)
    assert list(config.objectives) == list(config.principals)
    assert {RuleName.BASE, RuleName.LINEAR, RuleName.EQUILIBRIUM} < set(config.grid.rules)
    assert len([variant for variant in lay_out(config) if variant.rule is RuleName.LINEAR]) == 10
    assert (config.input.limit or 0) >= 40


@every_config
def test_inputs_inside_the_repository_exist(file: Path) -> None:
    path = load_job(file).input.path
    if path.startswith("configs/"):
        assert (FOLDER.parent / path).is_file()


def test_prompts_are_many_different_and_everyday() -> None:
    rows = [json.loads(line) for line in (FOLDER / "data/prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [row["prompt"] for row in rows]
    assert all(row.keys() == {"id", "topic", "prompt"} for row in rows)
    assert len({row["id"] for row in rows}) == len(set(prompts)) == len(rows) >= 64
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row["id"]) for row in rows)
    assert len({row["topic"] for row in rows}) >= 10
    assert len({row["topic"] for row in rows[:12]}) == 12
    assert min(map(len, prompts)) < 15
    assert max(map(len, prompts)) > 150
    assert sum("\n" in prompt for prompt in prompts) >= 3
    assert sum(not prompt.isascii() for prompt in prompts) >= 8


def test_yaml_files_have_no_duplicate_keys() -> None:
    class Strict(yaml.SafeLoader):
        pass

    def construct(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[object, object]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"duplicate keys {keys}"
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct)
    for file in FILES:
        yaml.load(file.read_text(encoding="utf-8"), Strict)
