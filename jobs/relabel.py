"""`python -m jobs.relabel -c FILE` is `cage relabel -c FILE`."""

from __future__ import annotations

import sys

from jobs.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "relabel")
    main()
