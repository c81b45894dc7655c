"""What each command imports: a second of start-up is a matter of modules, which can be counted."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "ray", "datasets", "pandas", "scipy", "tokenizers", "huggingface_hub", "fsspec"}


def cage(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command; how it ended, and the top-level modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "jobs", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        check=False,
    )
    modules = set(re.findall(r"^import time: .*\| +(\w+)[.\w]*$", done.stderr, flags=re.MULTILINE))
    assert "jobs" in modules
    done.stderr = re.sub(r"^import time: .*\n", "", done.stderr, flags=re.MULTILINE)
    return done, modules


@pytest.fixture(scope="module")
def folder(tiny, judge, tmp_path_factory) -> Path:
    """Prompts, configurations of the jobs, and a finished run of each."""
    folder = tmp_path_factory.mktemp("startup")
    (folder / "prompts.jsonl").write_text('{"id": "a", "prompt": "hi"}\n{"id": "b", "prompt": "ho"}\n')
    judges = {
        "kind": {"kind": "principal", "principal": "kind"},
        "model": {"kind": "reward_model", "model": str(judge())},
    }
    tree: dict[str, Any] = {
        "input": {"path": str(folder / "prompts.jsonl"), "id": "id"},
        "base": str(tiny()),
        "principals": {"kind": {"kind": "prompted", "principle": "be kind"}},
        "decoding": {"max_new_tokens": 3},
        "cluster": {"transport": "local", "slots": 4},
    }
    sections: dict[str, dict[str, Any]] = {
        "relabel": {},
        "evaluate": {
            "evaluation": {"judges": judges, "bootstrap": {"samples": 100}},
            "grid": {"rules": ["equilibrium", "base"]},
        },
        "synthesize": {"synthesis": {"judges": judges, "write": ["sft"], "filters": {"finish_reasons": ["length"]}}},
    }
    for job, section in sections.items():
        (folder / f"{job}.yaml").write_text(
            yaml.safe_dump({**tree, **section, "output": {"path": str(folder / job)}})
        )
        cli.app((job, "-c", str(folder / f"{job}.yaml")), standalone_mode=False)
    done, modules = cage("relabel", "-c", str(folder / "relabel.yaml"), f"output.path={folder / 'other'}")
    assert done.returncode == 0, done.stderr
    assert "torch" in modules  # so that a module that is imported is seen
    return folder


CASES = {
    "a wrong key": ("relabel -c {}/relabel.yaml decodng.seed=1", 2),
    "no configuration file": ("relabel -c {}/none.yaml", 2),
    "no input": ("relabel -c {}/relabel.yaml input.path={}/none.jsonl", 2),
    "no such column": ("relabel -c {}/relabel.yaml input.id=none", 2),
    "an output that cannot be written": ("relabel -c {}/relabel.yaml output.path={}/prompts.jsonl/run", 2),
    "no model folder": ("relabel -c {}/relabel.yaml base.model={}/none", 2),
    "another vocabulary's settings": ("relabel -c {}/relabel.yaml decoding.seed=5", 2),
    "no input of an evaluation": ("evaluate -c {}/evaluate.yaml input.path={}/none.jsonl", 2),
    "no judge's model": ("evaluate -c {}/evaluate.yaml evaluation.judges.model.model={}/none", 2),
    "a complete run": ("relabel -c {}/relabel.yaml", 0),
    "a complete evaluation": ("evaluate -c {}/evaluate.yaml", 0),
    "a complete data set": ("synthesize -c {}/synthesize.yaml", 0),
    "the whole configuration": ("relabel -c {}/relabel.yaml --print-config", 0),
    "plan": ("plan -c {}/relabel.yaml", 0),
    "plan of a new run": ("plan -c {}/relabel.yaml output.path={}/new", 0),
    "plan of an evaluation": ("plan -c {}/evaluate.yaml", 0),
    "status": ("status {}/relabel", 0),
    "inspect": ("inspect {}/relabel a", 0),
    "nothing to try again": ("retry {}/relabel", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_no_model_library_is_imported_for(case: str, folder: Path) -> None:
    command, code = CASES[case]
    done, modules = cage(*command.replace("{}", str(folder)).split())
    assert done.returncode == code, done.stderr
    # a plan shows prompts with their tokens, for which this small library is enough
    assert not modules & (HEAVY - {"tokenizers"} if command.startswith("plan ") else HEAVY)


def test_a_finished_run_is_found_without_its_tokenizer(folder: Path, tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny(), tmp_path / "model"))
    (model / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')  # of a format that transformers reads
    changes = (f"base.model={model}", f"output.path={tmp_path / 'run'}")
    for command, imports in (("plan", True), ("relabel", True), ("relabel", False)):
        done, modules = cage(command, "-c", str(folder / "relabel.yaml"), *changes)
        assert done.returncode == 0, done.stderr
        assert ("transformers" in modules) == imports
    assert "nothing to do" in done.stdout
