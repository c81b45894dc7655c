"""What YAML would change or drop without a word is refused, and an override changes what it names alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import cage

from pipeline.config.files import load_config, parse_config
from pipeline.errors import ConfigurationError

JOB = """\
input: {path: x}
output: {path: y}
base: m
principals:
  a: {kind: prompted, principle: be kind, weight: 0.5}
"""


def loaded(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return load_config(path, list(overrides))


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        (JOB + "  a: {kind: prompted, principle: be brief}\n", "a", 6),
        (JOB + "base: other\n", "base", 6),
        (JOB.replace("weight: 0.5", "weight: 0.5, weight: 2"), "weight", 5),
        (JOB + '"base": other\n', "base", 6),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_its_place(tmp_path, text, key, line):
    with pytest.raises(
        ConfigurationError, match=rf"job.yaml is not valid YAML: the key '{key}' is there twice.*{line}"
    ):
        loaded(tmp_path, text)


def test_a_key_may_replace_one_that_is_merged(tmp_path):
    text = JOB.replace("a: {", "a: &a {") + "  b: &b {<<: *a, weight: 2}\n  c: {<<: *b, principle: be brief}\n"
    principals = loaded(tmp_path, text).principals
    assert [(each.weight, each.principle) for each in principals.values()] == [
        (0.5, "be kind"), (2, "be kind"), (2, "be brief"),
    ]  # fmt: skip


def test_an_override_leaves_other_uses_of_an_alias_alone(tmp_path):
    text = JOB.replace("base: m", "base: &m {model: m, dtype: float32}").replace("weight: 0.5", "model: *m")
    config = loaded(tmp_path, text, "base.dtype=bfloat16")
    assert (config.base.dtype, config.principals["a"].model.dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize("value", ["use #tags", "use # tags", "#tags", "[a] # b", "a: b # c", "5 #"])
def test_an_override_that_ends_in_a_comment_is_refused(value):
    with pytest.raises(ConfigurationError, match=r"ends in a comment.*'principals.a.principle=\"\.\.\.\"'"):
        parse_config({}, [f"principals.a.principle={value}"])


@pytest.mark.parametrize(("value", "principle"), [("use#tags", "use#tags"), ('"use #tags"', "use #tags")])
def test_a_value_with_a_number_sign_is_read_whole(tmp_path, value, principle):
    assert loaded(tmp_path, JOB, f"principals.a.principle={value}").principals["a"].principle == principle


def test_an_override_reaches_below_the_name_of_a_draft_model(tmp_path):
    text = JOB + "decoding: {draft: auto, draft_model: small}\n"
    draft = loaded(tmp_path, text, "decoding.draft_model.revision=abc").decoding.draft_model
    assert (draft.model, draft.revision) == ("small", "abc")


def test_the_judges_of_a_comparison_are_read_by_the_same_rules(tmp_path):
    path = tmp_path / "judges.yaml"
    path.write_text("judges:\n  j: {kind: brevity}\n  j: {kind: length}\n")
    done = cage("compare", str(tmp_path / "a"), str(tmp_path / "b"), "-c", str(path))
    assert done.returncode == 2
    assert "judges.yaml is not valid YAML: the key 'j' is there twice" in done.stderr
    path.write_text("judges: 2001-13-45\n")
    done = cage("compare", str(tmp_path / "a"), str(tmp_path / "b"), "-c", str(path))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
