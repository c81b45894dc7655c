"""Audit the dependencies: `python tests/audit.py`, or `make audit`.

`requirements.lock` pins every package of an installation with the hashes of its files. It is checked against
constraints.txt and pyproject.toml; then pip-audit looks for known vulnerabilities of what it pins, where the package
index serves their data. Make the lock anew after a change of either file: `make lock`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LOCK = "requirements.lock"
EXTRAS = ("lora", "embedded", "evaluate", "synthesize", "gcs", "cluster", "train")
AUDIT_S = 1200.0


@dataclass(frozen=True)
class Audit:
    """What pip-audit found.

    Args:
        audited: packages for which there was data.
        skipped: packages for which there was none.
        vulnerable: lines with package, version, and the names of its vulnerabilities.
    """

    audited: int
    skipped: int
    vulnerable: tuple[str, ...]


def read_lock(text: str) -> dict[str, tuple[str, int]]:
    """The packages of a lock, each with its version and the number of its hashes."""
    found: dict[str, tuple[str, int]] = {}
    for entry in re.split(r"\n(?=\S)", text.replace("\\\n", " ")):
        if pinned := re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;]+)", entry):
            found[normal(pinned[1])] = (pinned[2], entry.count("--hash=sha256:"))
    return found


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def faults_of(lock: str, constraints: str, project: dict[str, Any]) -> list[str]:
    """What is wrong with a lock, a line each."""
    pinned = read_lock(lock)
    faults = [f"{name} {version} has no hash" for name, (version, hashes) in pinned.items() if not hashes]
    if loose := [line for line in lock.splitlines() if line and not line.startswith((" ", "#")) and "==" not in line]:
        faults += [f"{line} is not pinned" for line in loose]
    for line in constraints.splitlines():
        name, equals, version = line.partition("==")
        found = pinned.get(normal(name))
        if equals and found is not None and found[0] != version.strip():
            faults.append(f"{name} is {found[0]} in {LOCK} and {version.strip()} in constraints.txt")
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *(each for name in EXTRAS for each in extras[name])]
    names = [normal(re.split(r"[\[<>=!~ ;]", each)[0]) for each in wanted]
    own = normal(project["project"]["name"])
    faults += [f"{name} is not in {LOCK}" for name in dict.fromkeys(names) if name != own and name not in pinned]
    return faults


def read_audit(text: str) -> Audit:
    """What a report of pip-audit in JSON says."""
    packages = json.loads(text)["dependencies"]
    skipped = [each for each in packages if "skip_reason" in each]
    vulnerable = [
        f"{each['name']} {each['version']}: {', '.join(vulnerability['id'] for vulnerability in each['vulns'])}"
        for each in packages
        if each.get("vulns")
    ]
    return Audit(len(packages) - len(skipped), len(skipped), tuple(vulnerable))


def run_audit() -> Audit:
    """Run pip-audit in an environment of its own."""
    words = [sys.executable, "-m", "uv", "tool", "run", "--quiet", "pip-audit", "--requirement", str(ROOT / LOCK)]
    options = ["--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run([*words, *options], capture_output=True, text=True, check=False, timeout=AUDIT_S)
    if not done.stdout.startswith("{"):
        raise RuntimeError(f"pip-audit could not be run: {done.stderr.strip()[-500:]}")
    return read_audit(done.stdout)


def main() -> int:
    """Check and audit; 1 where something is wrong."""
    lock = (ROOT / LOCK).read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    faults = faults_of(lock, (ROOT / "constraints.txt").read_text(encoding="utf-8"), project)
    print(*(faults or [f"{LOCK}: {len(read_lock(lock))} packages, each with hashes, as constraints.txt pins them"]))
    audit = run_audit()
    print(*audit.vulnerable, sep="\n", end="\n" if audit.vulnerable else "")
    if audit.audited:
        print(f"{audit.audited} packages audited, {audit.skipped} without data, {len(audit.vulnerable)} vulnerable")
    else:
        print("not audited: this package index serves no data on vulnerabilities")
    return int(bool(faults or audit.vulnerable))


if __name__ == "__main__":
    sys.exit(main())
