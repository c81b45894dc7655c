"""Commands of the project, run as a user runs them: in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def cage(
    *arguments: str, module: tuple[str, ...] = ("-m", "jobs"), timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run the command line and keep what it prints; `module` is what python is given before the arguments."""
    return subprocess.run(
        [sys.executable, *module, *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False
    )
