"""Whatever a configuration file or an override holds, the command says it in printable lines and exits with 2."""

from __future__ import annotations

import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.config_values import GOOD, PLACES, VALUES, with_value

from jobs import cli

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
COMMANDS = st.sampled_from(["relabel", "plan"])


@pytest.fixture
def run_cage(monkeypatch, tmp_path, capfd):
    """The command in this process: its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cage", *arguments])
        code = cli._run()
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


def is_refused(answer: tuple[int, str]) -> None:
    code, shown = answer
    assert code == 2, shown
    assert "Traceback" not in shown
    assert shown.strip()
    assert all(char.isprintable() or char == "\n" for char in shown), repr(shown)


@FEW
@given(command=COMMANDS, place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_in_a_file_is_refused_with_2(run_cage, tmp_path, command, place, value):
    """`input.path` names no file, so that what is well-formed is refused too, before any model is loaded."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(with_value(place, value)))
    is_refused(run_cage(command, "-c", str(path)))


@FEW
@given(
    command=COMMANDS,
    data=st.binary(max_size=100),
    override=st.text(st.characters(exclude_characters="\x00"), max_size=15),
)
def test_any_bytes_and_any_override_are_refused_with_2(run_cage, tmp_path, command, data, override):
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    is_refused(run_cage(command, "-c", str(path), "--", override))
    path.write_text(yaml.safe_dump(GOOD))
    is_refused(run_cage(command, "-c", str(path), "--", f"input.path={override}"))
