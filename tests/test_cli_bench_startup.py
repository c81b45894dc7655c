"""The benchmark of start-up: what it compares, and that a command which fails counts for nothing."""

from __future__ import annotations

import pytest

from jobs.bench.startup import Case, Timing, make_cases, measure, print_timings, run_case
from pipeline.errors import CageError

PASS = Case("bare", ("-c", "pass"))


def test_a_ratio_is_of_medians_of_the_same_run():
    slow = Case("slow", ("-c", "import time; time.sleep(0.3)"), baseline="bare", limit=100.0)
    bare, slower = measure([PASS, slow], repeats=3)
    assert bare.ratio is None
    assert slower.ratio == slower.seconds / bare.seconds > 1
    assert slower.seconds >= 0.3


def test_each_run_of_a_case_finds_its_folder_removed(tmp_path):
    made = tmp_path / "made"
    measure([Case("makes", ("-c", f"import os; os.mkdir({str(made)!r})"), removed=made)], repeats=3)
    assert made.is_dir()


def test_a_case_that_ends_otherwise_is_an_error():
    assert run_case(Case("two", ("-c", "raise SystemExit(2)"), exit_code=2)) > 0
    with pytest.raises(CageError, match="one: exit code 1 instead of 0: this is why"):
        run_case(Case("one", ("-c", "import sys; sys.exit('this is why')")))


def test_byte_code_is_written_whatever_the_caller_wants(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    run_case(Case("writes", ("-c", "import sys; sys.exit(sys.dont_write_bytecode)")))


@pytest.mark.slow
def test_the_commands_end_as_they_must(tiny, tmp_path, capsys):
    cases = [case for case in make_cases(tmp_path, tiny()) if case.baseline == "imports"]
    assert len(cases) == 10
    print_timings([Timing(case.name, run_case(case), "bare", 1.0, 2.0) for case in cases], repeats=1)
    shown = capsys.readouterr().out
    for case in cases:
        assert case.name in shown
