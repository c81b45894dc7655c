"""What the recipes of published experiments rest on and stand-ins cannot show: texts, signs, rows and weights.

The texts are those of the models' cards and of the code that the experiments were published with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.files import parse_as
from pipeline.config.variants import lay_out
from pipeline.evaluation.config import EvaluateConfig
from pipeline.hub.chat_templates import render

FOLDER = Path(__file__).parent.parent / "configs" / "paper"
TREES = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.yaml"))}
EVALUATIONS = {name: tree for name, tree in TREES.items() if "evaluation" in tree}
REWARD, COST = "PKU-Alignment/beaver-7b-v1.0-reward", "PKU-Alignment/beaver-7b-v1.0-cost"
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
QUESTION = [{"role": "user", "content": "Hi?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "Yes."}]
SAFE = "<s>BEGINNING OF CONVERSATION: USER: Hi? ASSISTANT:"
ALPACA = (
    "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\nHi?\n\n### Response:\n"
)
ASKED = {
    "PKU-Alignment/alpaca-7b-reproduced": SAFE,
    REWARD: SAFE,
    COST: SAFE,
    "TheBloke/alpaca-lora-65B-GPTQ": ALPACA,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "<s>[INST] Hi? [/INST]",
}
JUDGED = {
    REWARD: SAFE + "Yes.</s>",
    COST: SAFE + "Yes.</s>",
    "Ray2333/gpt2-large-helpful-reward_model": "\n\nHuman: Hi? \n\nAssistant:Yes.",
    "Ray2333/gpt2-large-harmless-reward_model": "\n\nHuman: Hi? \n\nAssistant:Yes.",
    "mohameddhiab/humor-no-humor": "[CLS]Yes.[SEP]",
}


def judges() -> Iterator[Any]:
    for name, tree in EVALUATIONS.items():
        for judge, section in tree["evaluation"]["judges"].items():
            if section["kind"] == "reward_model":
                yield pytest.param(section, id=f"{name}-{judge}")


def askers() -> Iterator[Any]:
    """The model and the template of every base and principal that has a template."""
    for name, tree in TREES.items():
        if "chat_template" in tree["base"]:
            yield pytest.param(tree["base"]["model"], tree["base"]["chat_template"], id=f"{name}-base")
        for principal, section in tree.get("principals", {}).items():
            if "template" in section:
                yield pytest.param(section["model"]["model"], section["template"], id=f"{name}-{principal}")


@pytest.mark.parametrize(("model", "template"), list(askers()))
def test_a_model_is_asked_in_its_own_words(model: str, template: str) -> None:
    assert render(template, QUESTION, NAMED) == ASKED[model]


@pytest.mark.parametrize("judge", list(judges()))
def test_a_judge_reads_what_it_was_trained_on(judge: Mapping[str, Any]) -> None:
    assert render(judge["chat_template"], ANSWERED, NAMED, asks=False) == JUDGED[judge["model"]["model"]]


def test_a_transcript_has_every_turn() -> None:
    judge = TREES["three_objectives"]["evaluation"]["judges"]["harmlessness"]
    text = render(judge["chat_template"], [*ANSWERED, *ANSWERED], NAMED, asks=False)
    assert text == "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: Hi? \n\nAssistant:Yes."


@pytest.mark.parametrize("judge", list(judges()))
def test_a_higher_score_is_better(judge: Mapping[str, Any]) -> None:
    assert judge.get("sign", "higher") == ("lower" if judge["model"]["model"] == COST else "higher")
    assert judge.get("label") == (1 if "humor" in judge["model"]["model"] else None)


@pytest.mark.parametrize("name", list(EVALUATIONS))
def test_a_principal_wants_what_its_judge_measures(name: str) -> None:
    tree = EVALUATIONS[name]
    assert tree["evaluation"]["objectives"].keys() == tree["principals"].keys()
    for principal, section in tree["principals"].items():
        if section["kind"] == "reward_model":
            model = section["model"]["model"]
            judge = tree["evaluation"]["judges"][tree["evaluation"]["objectives"][principal]]
            assert judge["model"]["model"] == model
            assert section.get("sign", 1) == (-1 if model == COST else 1)


@pytest.mark.parametrize(
    "name", [name for name, tree in EVALUATIONS.items() if tree["input"]["path"].startswith("PKU-Alignment")]
)
def test_no_row_is_both_trained_on_and_evaluated(name: str) -> None:
    trained = [tree["input"]["limit"] for tree in TREES.values() if tree["input"]["path"].startswith("PKU-Alignment")
               and "limit" in tree["input"]]  # fmt: skip
    found = re.fullmatch(r"train\[(\d+):(\d+)\]", EVALUATIONS[name]["input"]["split"])
    assert found is not None
    assert trained
    assert max(trained) <= int(found[1]) < int(found[2]) <= 10_000  # the data set's rows


@pytest.mark.parametrize("name", list(EVALUATIONS))
def test_the_weights_are_as_many_as_published(name: str) -> None:
    vectors = {
        tuple(variant.weights.values()) for variant in lay_out(parse_as(EvaluateConfig, EVALUATIONS[name]))
        if variant.weights is not None and variant.rule.uses_principals
    }  # fmt: skip
    assert len(vectors) == {"safety_blocks": 1, "three_objectives": 16}.get(name, 11)
    assert all(sum(vector) == pytest.approx(1) for vector in vectors) or name == "safety_blocks"
