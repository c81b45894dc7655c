"""The table of kinds of principals: each kind is one file that says all there is to say about it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from support.commands import ROOT

from pipeline.principals.kinds import KINDS
from pipeline.principals.section import TUNED, PrincipalSection

EXAMPLES = {
    "prompted": {"principle": "be kind"},
    "arm": {"model": "one", "reference": "other"},
    "preference_arm": {"adapter": "one", "objective": "kind"},
    "tuned_pair": {"model": "one", "reference": "other"},
    "reward_model": {"model": "one"},
    "value": {"model": "one"},
    "judge": {"judge": {"kind": "length"}},
    "formula": {
        "formula": "one - 0.5 * max(other, base)",
        "terms": {"one": {"model": "one"}, "other": {"model": "other"}},
    },
}


def test_there_is_an_example_of_every_kind():
    assert set(EXAMPLES) == set(KINDS)


ON_TOKENS = [kind for kind in KINDS if KINDS[kind](kind=kind, **EXAMPLES[kind]).judged_by is None]


def test_a_kind_that_values_text_names_a_judge_and_has_no_roles():
    others = {kind: KINDS[kind](kind=kind, **EXAMPLES[kind]) for kind in KINDS if kind not in ON_TOKENS}
    assert list(others) == ["judge"]
    assert all(section.roles() == {} and section.judged_by for section in others.values())


@pytest.mark.parametrize("kind", ON_TOKENS)
def test_a_kind_has_roles_with_the_tuned_one_first_and_rewards_of_their_outputs(kind):
    section = KINDS[kind](kind=kind, **EXAMPLES[kind])
    roles = section.roles()
    assert next(iter(roles)) == TUNED
    outputs = {part: torch.randn(2, 3).log_softmax(-1) for part in roles}
    rewards = section.rewards(outputs)
    assert rewards.shape == (2, 3)
    assert rewards.dtype == torch.float64
    # of the outputs that it asked for, each counts
    for part in roles:
        assert not torch.equal(section.rewards({**outputs, part: outputs[part] - 1}), rewards)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_a_kind_is_documented(kind):
    section = KINDS[kind]
    text = f"{inspect.getdoc(section)}\n{inspect.getdoc(PrincipalSection)}"
    undocumented = [
        key for key, field in section.model_fields.items() if not field.description and f"`{key}`" not in text
    ]
    assert undocumented == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_named_in_its_own_file_and_in_the_table_and_nowhere_else(kind):
    """So that another kind takes one file and a line."""
    section = KINDS[kind]
    files = [file for folder in ("cage", "pipeline", "jobs") for file in (ROOT / folder).rglob("*.py")]
    naming = {file for file in files if re.search(rf"\b{section.__name__}\b", file.read_text(encoding="utf-8"))}
    assert naming == {Path(inspect.getfile(section)), ROOT / "pipeline/principals/kinds.py"}
    assert sum(Path(inspect.getfile(other)) in naming for other in KINDS.values()) == 1
