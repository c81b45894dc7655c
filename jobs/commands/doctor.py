"""`cage doctor`: what this machine, a place to write to and a cluster have and lack."""

from __future__ import annotations

import json

from jobs.commands.text import printable
from pipeline.errors import CageError
from pipeline.stages.doctor import Verdict, examine


def run_doctor(*, storage: str | None, address: str | None, as_json: bool) -> None:
    """Print every finding as it is made. Raises CageError where something is missing."""
    findings = list(examine(storage=storage, address=address))
    if as_json:
        tree = [{"area": each.area, "verdict": str(each.verdict), "text": each.text} for each in findings]
        print(json.dumps(tree, ensure_ascii=False, indent=1))
    else:
        rows = [[each.area, str(each.verdict), printable(each.text)] for each in findings]
        widths = [max(len(row[at]) for row in rows) for at in range(2)]
        for area, verdict, text in rows:
            print(f"{area.ljust(widths[0])}  {verdict.ljust(widths[1])}  {text}")
    missing = [each.area for each in findings if each.verdict is Verdict.MISSING]
    if missing:
        raise CageError(f"runs will fail here: {', '.join(dict.fromkeys(missing))}")
