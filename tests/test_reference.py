"""The page of all keys is made from the typed sections, and says something of each."""

from __future__ import annotations

from pathlib import Path

from jobs.reference import keys, render
from pipeline.hub.embedded import FORMAT, VERSION

ROOT = Path(__file__).parent.parent


def test_the_page_of_all_keys_is_current() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == render(), "write it again: python -m jobs.reference > docs/configuration.md"


def test_every_key_has_a_meaning() -> None:
    unexplained = [place for place, field in keys() if not field.description and not place.endswith(".kind")]
    assert unexplained == []


def test_the_page_has_every_key_once_a_section() -> None:
    page = render()
    for place, _ in keys():
        assert f"| `{place.rpartition('.')[2]}` |" in page
    titles = [line for line in page.splitlines() if line.startswith("### ")]
    assert len(titles) == len(set(titles)), "two sections of one name"
    for kind in ("prompted", "arm", "tuned_pair", "reward_model", "formula", "value"):
        assert f"### principals: kind {kind}" in page


def test_the_place_of_the_embedded_model_is_the_one_that_is_named() -> None:
    assert f"models/smollm2-135m-{VERSION}-{FORMAT}" in (ROOT / "docs/models.md").read_text(encoding="utf-8")
