"""A run that an earlier version planned goes on: keys that came later are nothing at their defaults."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.storage import make_config, small_plan

from pipeline.errors import RunMismatch
from pipeline.storage.plan import Plan, make_plan
from pipeline.storage.run import Run
from pipeline.stores.store import open_store

LATER: dict[str, Any] = {
    "input.format": "auto",
    "input.last_assistant": None,
    "input.tools": None,
    "input.keep": [],
    "input.allow_special_tokens": False,
    "base.chat_template_time": None,
    "base.attention": "auto",
    "principals.brief.placement": "auto",
    "principals.brief.model.attention": "auto",
}


def planned_by_another_version(folder: Path, **fields: Any) -> Plan:
    plan = small_plan(folder)
    return replace(plan, fingerprint={**plan.fingerprint, **fields})


def test_no_key_that_came_later_is_in_a_fingerprint_at_its_default(tmp_path: Path) -> None:
    assert not LATER.keys() & small_plan(tmp_path).fingerprint.keys()


@pytest.mark.parametrize("fields", [{}, LATER, dict(list(LATER.items())[:4])], ids=["none", "all", "some"])
def test_a_run_planned_with_or_without_later_keys_goes_on_under_its_own_digest(tmp_path: Path, fields: Any) -> None:
    store = open_store(str(tmp_path / "run"))
    begun = Run.create_or_resume(store, planned_by_another_version(tmp_path, **fields))
    resumed = Run.create_or_resume(store, small_plan(tmp_path))
    assert resumed.plan.digest == begun.plan.digest == Run.open(store.path).plan.digest


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"input": {"allow_special_tokens": True}}, "input.allow_special_tokens: absent -> True"),
        ({"base": {"model": "x", "attention": "plain"}}, "base.attention: absent -> 'plain'"),
        (
            {"principals": {"brief": {"kind": "prompted", "principle": "p", "placement": "user"}}},
            "principals.brief.placement: absent -> 'user'",
        ),
    ],
)
def test_a_later_key_with_another_value_is_a_difference(tmp_path: Path, sections: Any, field: str) -> None:
    store = open_store(str(tmp_path / "run"))
    Run.create_or_resume(store, small_plan(tmp_path))
    changed = make_plan(make_config(tmp_path / "prompts.jsonl", store.path, **sections), {"base": "tiny@abc123"})
    with pytest.raises(RunMismatch) as caught:
        Run.create_or_resume(store, changed)
    assert field in str(caught.value)


def test_names_that_a_user_chooses_are_in_the_fingerprint_whatever_they_are(tmp_path: Path) -> None:
    """A principal may be named as a key of placement is, and so may a value that a chat template reads."""
    sections = {
        "base": {"model": "base", "device": "cpu", "chat_template_kwargs": {"device": "phone", "more": {"sizes": 1}}},
        "principals": {"device": {"kind": "prompted", "principle": "Name a device.", "weight": 2}},
    }
    fields = small_plan(tmp_path, **sections).fingerprint
    assert fields["principals.device.weight"] == 2
    assert fields["base.chat_template_kwargs.device"] == "phone"
    assert fields["base.chat_template_kwargs.more.sizes"] == 1
    assert "base.device" not in fields
