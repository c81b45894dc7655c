"""A fault in a configuration is said in the words of YAML, not in those of the library that finds it."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pipeline.config.files import parse_as, parse_config
from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.principals.kinds import KINDS
from pipeline.synthesis.settings import SynthesizeConfig

FOREIGN = (
    "valid", "tuple", "dictionary", "instance", "extract", "parse", "pattern", "boolean", "integer", "string",
    "datetime", "interpret", "NaN", "Config", "iterable", "null byte", "validation", "items",
)  # fmt: skip
VALUES: list[Any] = [
    "", [], {}, "text", 1, 1.5, True, None, -1, float("nan"), [1], ["x", 1], {"a": 1}, {"a": None}, [{}], [[]],
    10**30,
]  # fmt: skip
START = {"input": {"path": "x"}, "output": {"path": "y"}}


def places_of(section: type[BaseModel], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a section and of the sections below it."""
    found = []
    for name, field in section.model_fields.items():
        found.append((*before, name))
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += places_of(kind, (*before, name))
    return found


PRINCIPALS = [
    ("principals", "a", *place) for kind in KINDS.values() for place in places_of(kind) if place != ("kind",)
]
CASES = [
    *((Config, place) for place in dict.fromkeys([*places_of(Config), *PRINCIPALS])),
    *((kind, place) for kind in (EvaluateConfig, SynthesizeConfig) for place in places_of(kind)),
]


@pytest.mark.parametrize(("kind", "place"), CASES, ids=lambda each: getattr(each, "__name__", None) or ".".join(each))
def test_no_key_is_refused_in_foreign_words(kind, place):
    for value in VALUES:
        for name in KINDS if place[0] == "principals" and len(place) > 1 else ["none"]:
            tree: dict[str, Any] = copy.deepcopy(START)
            if name != "none":
                tree["principals"] = {"a": {"kind": name}}
            *above, last = place
            node = tree
            for key in above:
                node = node.setdefault(key, {})
            node[last] = value
            try:
                parse_as(kind, tree)
            except ConfigurationError as refusal:
                for line in str(refusal).splitlines():
                    said = line.split("; got ")[0].split("; known keys: ")[0].removeprefix("configuration: ")
                    said = said.partition(" ")[2]
                    assert not any(word in said for word in FOREIGN), line


JUDGES = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(AnyJudge)[0])}


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize(("kind", "section"), [(EvaluateConfig, "evaluation"), (SynthesizeConfig, "synthesis")])
def test_no_key_of_a_judge_is_refused_in_foreign_words(name, kind, section):
    for key in JUDGES[name].model_fields:
        for value in VALUES:
            tree = {**copy.deepcopy(START), section: {"judges": {"j": {"kind": name, key: value}}}}
            try:
                parse_as(kind, tree)
            except ConfigurationError as refusal:
                for line in str(refusal).splitlines():
                    said = line.split("; got ")[0].split("; known keys: ")[0].removeprefix("configuration: ")
                    assert not any(word in said.partition(" ")[2] for word in FOREIGN), line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("decoding.stop=3", "decoding.stop must be a list; got 3"),
        ("decoding.max_new_tokens=many", "decoding.max_new_tokens must be a whole number; got 'many'"),
        ("decoding.max_new_tokens=1.5", "decoding.max_new_tokens must be a whole number; got 1.5"),
        ("decoding.max_new_tokens=0", "decoding.max_new_tokens must be greater than or equal to 1; got 0"),
        ("decoding.n=2000", "decoding.n must be less than or equal to 1024; got 2000"),
        ("decoding.temperature=warm", "decoding.temperature must be a number; got 'warm'"),
        ("base.trust_remote_code=maybe", "base.trust_remote_code must be true or false; got 'maybe'"),
        ("base.revision=3", "base.revision must be text; got 3"),
        ("base.device=gpu", "base.device must be auto, cpu, cuda or cuda:N; got 'gpu'"),
        ("cluster=ray", "cluster must be a mapping, with one key: value per line; got 'ray'"),
    ],
)
def test_a_fault_says_what_would_be_right(override, said):
    with pytest.raises(ConfigurationError) as refused:
        parse_config({**copy.deepcopy(START), "base": {"model": "m"}}, [override])
    assert str(refused.value) == f"configuration: {said}"


@pytest.mark.parametrize(("text", "value"), [("true", True), ("no", False)])
@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("decoding.max_new_tokens", "a whole number"), ("decoding.candidates", "a whole number"),
        ("decoding.target_kl", "a number"), ("cluster.replicas", "a whole number"),
        ("input.limit", "a whole number"), ("base.resources.num_gpus", "a number"),
    ],
)  # fmt: skip
def test_true_and_false_are_no_numbers(key, kind, text, value):
    with pytest.raises(ConfigurationError) as refused:
        parse_config({**copy.deepcopy(START), "base": {"model": "m"}}, [f"{key}={text}"])
    assert str(refused.value) == f"configuration: {key} must be {kind}; got {value}"


def test_true_is_no_weight_and_no_number_of_a_list():
    principal = {"kind": "prompted", "principle": "be kind", "weight": True}
    with pytest.raises(ConfigurationError, match=r"principals.a.weight must be a number; got True$"):
        parse_config({**copy.deepcopy(START), "base": "m", "principals": {"a": principal}})
    with pytest.raises(ConfigurationError, match=r"grid.agent_temperatures must be a number; got \[0.5, True\]$"):
        parse_config({**copy.deepcopy(START), "base": "m"}, ["grid.agent_temperatures=[0.5, true]"])
