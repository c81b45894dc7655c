"""`cage bench rules`: every rule is brought to its target, and the threshold pays where it should."""

from __future__ import annotations

import json

import pytest

from jobs.bench.rules import RULES, gain_at, make_games, run_bench_rules


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_brought_to_its_target(name):
    gain, kl = gain_at(RULES[name], *make_games(20, 2, tokens=1.0, steps=1.0, noise=0.3), 0.2)
    assert kl == pytest.approx(0.2, rel=1e-4)
    assert gain > 0


def test_a_threshold_loses_on_dense_clean_signals_and_wins_on_sparse_noisy_ones():
    def ratio(**kind):
        games = make_games(300, 2, **kind)
        return gain_at(RULES["equilibrium"], *games, 0.4)[0] / gain_at(RULES["linear"], *games, 0.4)[0]

    assert ratio(tokens=1.0, steps=1.0, noise=0.3) < 0.9
    assert ratio(tokens=0.1, steps=0.15, noise=2.0) > 1.1


def test_the_measurements_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jobs.bench.rules.SHARES", ((1.0, 1.0),))
    monkeypatch.setattr("jobs.bench.rules.NOISES", (1.0,))
    monkeypatch.setattr("jobs.bench.rules.TARGETS", (0.4,))
    monkeypatch.setattr("jobs.bench.rules.NUM_HALVINGS", 6)
    run_bench_rules(games=5, principals=3, json_file=tmp_path / "rules.json")
    gains = json.loads((tmp_path / "rules.json").read_text())["gains"]
    assert {gain["rule"] for gain in gains} == set(RULES)
    assert all(gain["ratio"] == 1 for gain in gains if gain["rule"] == "linear")
    assert "equilibrium" in capsys.readouterr().out
