"""The oldest transformers that pyproject.toml allows: every module is imported with it, and a run decodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ITS_OWN = ("transformers", "tokenizers", "huggingface", "httpx", "httpcore")  # what goes with its version
IMPORT_ALL = """
import importlib, pkgutil
import transformers
import cage, jobs, pipeline
for root in (cage, pipeline, jobs):
    for module in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
        if not module.name.endswith(("__main__", "row_kernel")):  # one runs, the other takes Triton
            importlib.import_module(module.name)
print(transformers.__version__)
"""


def oldest(package: str) -> str:
    """The version that pyproject.toml allows at least."""
    found = re.search(rf'"{package}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found
    return found[1]


def run(*words: str, environ: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, *words], env=environ, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
def test_the_oldest_transformers_that_is_allowed_decodes(tiny, tmp_path):
    version = oldest("transformers")
    place, others = tmp_path / "packages", tmp_path / "others.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    others.write_text("".join(line for line in lines if not line.startswith(ITS_OWN)))
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--constraint", others, "--target", place]
    subprocess.run([*install, f"transformers=={version}"], check=True)
    environ = {**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{ROOT}"}
    assert run("-c", IMPORT_ALL, environ=environ).split()[-1].removesuffix(".0") == version.removesuffix(".0")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": str(at), "prompt": f"say {at}"}) + "\n" for at in range(4)))
    job = {
        "input": {"path": str(prompts), "id": "id"},
        "output": {"path": str(tmp_path / "run")},
        "base": {"model": str(tiny())},
        "principals": {name: {"kind": "prompted", "principle": f"Be {name}."} for name in ("brief", "kind")},
        "decoding": {"max_new_tokens": 4},
        "cluster": {"transport": "local", "slots": 2},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    run("-m", "jobs", "relabel", "-c", str(tmp_path / "job.yaml"), environ=environ)
    shard = next((tmp_path / "run").glob("part-*.parquet"))
    assert shard.stat().st_size > 0
