"""What the dashboard asks for, and what an endpoint of Ray has."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

DASHBOARD = Path(__file__).parent.parent.parent / "infra/grafana-dashboard.json"


def asked_by_dashboard():
    """The names of all series that the dashboard's expressions and variables read."""
    tree = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in tree["panels"] for target in panel["targets"]]
    asked += [each["definition"] for each in tree["templating"]["list"] if each["type"] == "query"]
    return set(re.findall(r"\b(?:ray_)?cage_\w+", " ".join(asked)))


def scraped(endpoint, run):
    """By name, and by the label of outcome, error, what or host, the values of a run's series."""
    with urllib.request.urlopen(endpoint, timeout=30) as reply:
        text = reply.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(ray_cage_\w+)\{(.*)\} (\S+)$", text, flags=re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags["run"] == run:
            kind = next((tags[each] for each in ("outcome", "error", "what", "host") if each in tags), "")
            found.setdefault(name, {})[kind] = float(value)
    return found
