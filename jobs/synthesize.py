"""`python -m jobs.synthesize -c FILE` is `cage synthesize -c FILE`."""

from __future__ import annotations

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "synthesize")
    main()
