"""The ten lines run as they are shown, and print what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
START, END = "<!-- equilibrium:start -->", "<!-- equilibrium:end -->"


def shown_code():
    """Return the code of the README's section."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition(START)[2].partition(END)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_equilibrium_in_ten_lines_runs_and_prints_what_it_says(capsys):
    (code,) = shown_code()
    exec(compile(code, "README.md", "exec"), {})
    printed = [
        [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-\d+)?", line)]
        for line in capsys.readouterr().out.splitlines()
    ]
    claimed = [re.findall(r"# (.*?):", line)[0] for line in code.splitlines() if line.startswith("print")]
    assert len(printed) == len(claimed) == 4
    for numbers, claim in zip(printed, claimed, strict=True):
        expected = [float(number) for number in claim.split(",")]
        assert numbers == pytest.approx(expected * (len(numbers) // len(expected)), abs=6e-3)


def test_the_ten_lines_are_about_ten():
    (code,) = shown_code()
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
