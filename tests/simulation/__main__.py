"""Run schedules: `python -m tests.simulation --schedules 10000 --seed 0`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the tests import each other by their own names

from simulation.cli import main

if __name__ == "__main__":
    sys.exit(main())
