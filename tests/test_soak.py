"""The soak in miniature, and what its figures mean."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import soak
from support.commands import ROOT
from support.table_hosts import END, LONGEST, token_after


def test_the_table_answers_by_the_prompt_and_the_number_of_tokens_alone():
    for prompt in (b"one", b"two", b"three"):
        tokens = [token_after(prompt, count) for count in range(LONGEST + 1)]
        assert tokens == [token_after(prompt, count) for count in range(LONGEST + 1)]
        assert tokens[0] != END
        assert tokens[-1] == END
    assert len({token_after(str(at).encode(), 0) for at in range(200)}) > 10


def test_memory_is_told_by_kind_with_the_growth_of_the_oldest_process():
    memory = soak.Memory()
    memory.samples = {
        ("driver", 1): [(at, 100_000_000 + at * 1000) for at in range(0, 3601, 60)],
        ("driver", 2): [(0.0, 500_000_000)],
        ("host", 3): [(1800.0, 7_000_000), (3600.0, 9_000_000)],
    }
    facts = memory.by_kind()
    assert facts["driver"]["processes"] == 2
    assert facts["driver"]["first_mb"] == 500
    assert facts["driver"]["last_mb"] == pytest.approx(103.6)
    assert facts["driver"]["oldest_growth_mb_per_hour"] == pytest.approx(3.6)
    assert facts["host"]["first_mb"] == 0
    assert "driver" in soak.describe({"rows": 3, "memory": facts})


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
def test_a_minute_of_kills_loses_and_changes_nothing(tmp_path):
    report = tmp_path / "report.json"
    options = ["--rows", "3000", "--minutes", "0.5", "--kill-every", "10", "--json", str(report)]
    done = subprocess.run(
        [sys.executable, "tests/soak.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert (found["files"], found["files_differing"]) == (12, 0)
    assert sum(found["kills"].values()) >= 1
    assert {"driver", "host", "coordinator", "raylet"} <= set(found["memory"])
