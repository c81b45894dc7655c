"""`python -m jobs.evaluate -c FILE` is `cage evaluate -c FILE`."""

from __future__ import annotations

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
