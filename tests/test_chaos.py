"""A few random schedules of kills; `python tests/chaos.py` runs as many as one likes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from support.commands import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "num_kills"),
    [
        (["--schedules", "3", "--seed", "100"], 3),
        pytest.param(["--schedules", "2", "--seed", "200", "--growing"], 2, marks=pytest.mark.nightly),
        # a coordinator at a point, and a node of a cluster of three
        pytest.param(
            ["--schedules", "1", "--seed", "11", "--transport", "ray"],
            1,
            marks=[pytest.mark.ray, pytest.mark.nightly],
        ),
    ],
)
def test_runs_killed_at_random_lose_repeat_and_change_nothing(options, num_kills):
    command = [sys.executable, "tests/chaos.py", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"^total .*kills (\d+)", result.stdout, re.MULTILINE)[1]) >= num_kills
    assert "rows lost 0  rows repeated 0  files differing 0" in result.stdout.splitlines()[-1]
