"""What the image installs is all that its commands need: its extras alone, in an environment of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.dashboard import asked_by_dashboard, scraped
from support.ray_machines import Machines, free_port
from support.runs import job, write_prompts
from support.tiny_models import make_model

ROOT = Path(__file__).parent.parent
COMMANDS = (
    "relabel",
    "evaluate",
    "synthesize",
    "plan",
    "retry",
    "status",
    "inspect",
    "report",
    "models",
    "fetch",
    "bench",
)


def installed_by_the_image() -> list[str]:
    """What the Dockerfile gives to uv, after its options."""
    text = (ROOT / "infra/Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    [install] = re.findall(r"uv pip install ([^&\n]+)", text)
    words = shlex.split(re.sub(r"\$\{TORCH_INDEX:[^}]*\}", "", install))  # empty unless a build is given one
    assert words[:4] == ["--system", "--compile-bytecode", "-c", "constraints.txt"]
    return words[4:]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a fresh environment with what the image installs, out of what the image copies."""
    folder = tmp_path_factory.mktemp("image")
    context = folder / "app"
    context.mkdir()
    text = (ROOT / "infra/Dockerfile").read_text(encoding="utf-8")
    for names in re.findall(r"^COPY (.+)$", text, flags=re.MULTILINE):
        *sources, _ = names.split()
        for source in sources:
            into = context / source
            into.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, into)
    uv = [sys.executable, "-m", "uv"]
    environment = {
        **os.environ,
        "UV_FIND_LINKS": os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS", ""),
    }
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, folder / "venv"], check=True, env=environment)
    given = installed_by_the_image()
    installed = subprocess.run(
        [*uv, "pip", "install", "--quiet", "--python", folder / "venv/bin/python", "-c", "constraints.txt", *given],
        cwd=context, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    return folder / "venv/bin"


def run(image: Path, *arguments: str | Path) -> str:
    """What the command prints, as the image runs it: not from the repository's folder."""
    done = subprocess.run(
        [image / "cage", *arguments],
        cwd=image.parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_the_image_has_what_each_command_needs(image: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"question {at}"}) + "\n" for at in range(3))
    )
    job = {
        "input": {"path": str(tmp_path / "prompts.jsonl"), "prompt": "prompt"},
        "base": {"model": str(model)},
        "principals": {"kind": {"kind": "prompted", "principle": "Be kind."}},
        "decoding": {"max_new_tokens": 4, "temperature": 1.0, "candidates": 10},
        "cluster": {"transport": "local", "slots": 4},
    }
    judges = {
        "tone": {"kind": "sentiment"},
        "clean": {"kind": "profanity"},
        "own": {"kind": "principal", "principal": "kind"},
    }
    sections = {
        "relabel": {},
        "evaluate": {
            "grid": {"rules": ["equilibrium", "linear"]},
            "evaluation": {"judges": judges, "objectives": {"kind": "tone"}},
        },
        "synthesize": {
            "decoding": {**job["decoding"], "n": 2},
            "synthesis": {
                "judges": judges,
                "filters": {"finish_reasons": ["stop", "length"], "duplicates": {"near": 0.9}},
                "write": ["sft"],
            },
        },
    }
    for command, section in sections.items():
        path = tmp_path / f"{command}.yaml"
        path.write_text(yaml.safe_dump({**job, **section, "output": {"path": str(tmp_path / command)}}))
        run(image, command, "-c", path)
        assert (tmp_path / command / "_SUCCESS").exists()
    assert "complete" in run(image, "status", tmp_path / "relabel")
    run(image, "report", tmp_path / "evaluate")


@pytest.mark.nightly
@pytest.mark.slow
def test_the_image_shows_the_help_of_each_command(image: Path) -> None:
    shown = run(image, "--help")
    for command in COMMANDS:
        assert command in shown
        assert "Usage:" in run(image, command, "--help")


@pytest.mark.nightly
@pytest.mark.slow
def test_the_image_reaches_the_stores_that_the_documentation_names(image: Path) -> None:
    packages = "import s3fs, gcsfs, peft, gguf, moocore, datasketch, vaderSentiment, better_profanity, aiohttp"
    subprocess.run([image / "python", "-c", packages], check=True, cwd=image.parent, timeout=300)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_of_the_image_exports_what_the_dashboard_asks_for(image: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    with prompts.open("a") as file:
        file.write(json.dumps({"id": "bad", "prompt": 7}) + "\n")
    arm = {"kind": "arm", "model": str(make_model(tmp_path / "arm", seed=5)), "reference": "none", "weight": 0.1}
    base, run_folder = make_model(tmp_path / "model"), str(tmp_path / "run")
    machines = Machines(programs=image, environment={"RAY_metrics_report_interval_ms": "1000"})
    try:
        port = free_port()
        machines.start_head(f"--metrics-export-port={port}", num_cpus=3)
        cluster = {"transport": "ray", "slots": 4, "address": machines.address}
        config = job(prompts, run_folder, base, cluster=cluster, principals={"arm": arm}, errors={"budget": 1})
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
        driver = machines.run([str(image / "cage"), "relabel", "-c", str(path)])
        asked, series = asked_by_dashboard(), {}
        until_s = time.monotonic() + 600
        while time.monotonic() < until_s and not (driver.poll() is not None and asked <= set(series)):
            time.sleep(0.5)
            with contextlib.suppress(OSError):  # before it listens
                series |= scraped(f"http://127.0.0.1:{port}/metrics", run_folder)  # gauges go after the run
        said, _ = driver.communicate(timeout=60)
        assert driver.returncode == 0, said
        series |= scraped(f"http://127.0.0.1:{port}/metrics", run_folder)
    finally:
        machines.stop()
    assert asked <= set(series)
    tokens = int(re.search(r"tokens +([0-9,]+)", said)[1].replace(",", ""))
    assert sum(series["ray_cage_tokens_total"].values()) == tokens
    assert series["ray_cage_rows_total"] == {"aligned": 7.0, "failed": 1.0}
    assert series["ray_cage_shards_total"]["committed"] == 3.0
    assert series["ray_cage_errors_total"]["RowError"] == 1.0
    assert set(series["ray_cage_passes_total"]) == {"base", "arm"}
    assert min(series["ray_cage_passes_total"].values()) >= 1
    assert min(series["ray_cage_forward_seconds_total"].values()) > 0
    assert series["ray_cage_solve_seconds_total"]["coordinator"] > 0
    assert sum(series["ray_cage_games_total"].values()) >= tokens
