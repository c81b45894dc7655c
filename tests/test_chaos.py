"""A few random schedules of kills; `python tests/chaos.py` runs as many as one likes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from test_cli import ROOT


@pytest.mark.slow
def test_runs_killed_at_random_lose_repeat_and_change_nothing():
    command = [sys.executable, "tests/chaos.py", "--schedules", "3", "--seed", "100"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rows lost 0  rows repeated 0  files differing 0" in result.stdout.splitlines()[-1]
