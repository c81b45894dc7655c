"""The configuration of an evaluation: a mistake is reported in one line, and without loading what takes long."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.config.files import parse_as
from pipeline.errors import ConfigurationError
from pipeline.evaluation.config import EvaluateConfig

LENGTH = {"kind": "length"}


def parse(evaluation, **sections) -> EvaluateConfig:
    tree = {
        "input": {"path": "x.jsonl"},
        "output": {"path": "runs/x"},
        "principals": {name: {"kind": "prompted", "principle": name} for name in ("kind", "brief")},
        "evaluation": evaluation,
        **sections,
    }
    return parse_as(EvaluateConfig, tree)


def test_objectives_are_matched_by_name_in_the_order_of_the_principals():
    judges = {"brief": LENGTH, "tone": {"kind": "sentiment"}}
    assert parse({"judges": judges}).objectives == {"brief": "brief"}
    named = parse({"judges": judges, "objectives": {"brief": "brief", "kind": "tone"}}).objectives
    assert list(named.items()) == [("kind", "tone"), ("brief", "brief")]


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (
            {"judges": {"kind": {**LENGTH, "unt": "words"}}},
            r"judges\.kind\.unt is not a known key; did you mean unit",
        ),
        ({"judges": {"length": {"kind": "lenght"}}}, r"judges\.length\.kind must be one of sentiment, .*; got 'leng"),
        ({"judges": {"length": {}}}, r"evaluation\.judges\.length\.kind must be one of"),
        ({"judges": {"kind": {**LENGTH, "unit": "pages"}}}, r"judges\.kind\.unit must be 'words' or 'tokens'; got"),
        ({"judges": {"r": {"kind": "reward_model", "model": {"name": "x"}}}}, r"judges\.r\.model\.name is not a"),
        (
            {"judges": {"own": {"kind": "principal", "principal": "x"}}},
            r"judges\.own\.principal must be one of kind,",
        ),
        ({"judges": {"words": LENGTH}}, "a judge for at least one principal"),
        ({"judges": {"words": LENGTH}, "objectives": {"x": "words"}}, "unknown principal 'x'"),
        ({"judges": {"words": LENGTH}, "objectives": {"kind": "x"}}, r"objectives\.kind must be one of .*words"),
        ({"judges": {"kind": LENGTH}, "reference_point": {"brief": 0}}, r"reference_point must name .* \(kind\)"),
        ({"judges": {"sample": LENGTH}, "objectives": {"kind": "sample"}}, "none of row_id, variant, sample"),
        ({"judges": {"kind": LENGTH}, "bootstrap": {"samples": 1}}, r"bootstrap\.samples must be greater"),
    ],
)
def test_what_is_wrong_is_reported(evaluation, message):
    with pytest.raises(ConfigurationError, match=message):
        parse(evaluation)


def test_weights_must_be_those_of_the_grid():
    with pytest.raises(ConfigurationError, match=r"give grid\.weights, not input\.weights"):
        parse({"judges": {"kind": LENGTH}}, input={"path": "x", "weights": "w"})


@pytest.mark.parametrize(
    "module", ["pipeline.evaluation.config", "pipeline.evaluation.panel", "pipeline.synthesis.settings"]
)
def test_a_configuration_is_read_without_models_or_arrays(module):
    found = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert not {"torch", "transformers", "numpy", "pyarrow", "ray"} & set(loaded)
