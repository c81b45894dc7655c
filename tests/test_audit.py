"""The lock of all dependencies: complete, hashed, and what constraints.txt and pyproject.toml say."""

from __future__ import annotations

import json
import tomllib

import audit
import pytest

PROJECT = tomllib.loads((audit.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (audit.ROOT / "constraints.txt").read_text(encoding="utf-8")
LOCKED = (audit.ROOT / audit.LOCK).read_text(encoding="utf-8")


def test_the_lock_is_whole_and_agrees():
    assert audit.faults_of(LOCKED, CONSTRAINTS, PROJECT) == []
    assert len(audit.read_lock(LOCKED)) > 80
    assert "://" not in LOCKED


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda lock: lock.replace("ray==2.60.0", "ray==2.59.0"), "ray is 2.59.0 in requirements.lock and 2.60.0"),
        (lambda lock: lock + "\nfree==1.0\n", "free 1.0 has no hash"),
        (lambda lock: lock + "\nloose>=1.0\n", "loose>=1.0 is not pinned"),
        (lambda lock: lock.replace("\njinja2==", "\nninja2=="), "jinja2 is not in requirements.lock"),
    ],
)
def test_what_is_wrong_with_a_lock_is_named(change, fault):
    [found] = audit.faults_of(change(LOCKED), CONSTRAINTS, PROJECT)
    assert found.startswith(fault)


def test_packages_without_data_do_not_count_as_audited():
    report = {
        "dependencies": [
            {"name": "one", "version": "1", "vulns": []},
            {"name": "two", "version": "2", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]},
            {"name": "three", "skip_reason": "not found"},
        ]
    }
    assert audit.read_audit(json.dumps(report)) == audit.Audit(2, 1, ("two 2: PYSEC-1, PYSEC-2",))
