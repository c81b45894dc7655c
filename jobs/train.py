"""`python -m jobs.train -c FILE` is `cage train -c FILE`; `accelerate launch -m jobs.train -c FILE` uses all GPUs."""

from __future__ import annotations

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
