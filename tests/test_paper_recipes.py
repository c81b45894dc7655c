"""Every recipe of a published experiment runs to its end, on tiny models of the same classes and data alike."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import tiny_models
from support.heads import random, with_head
from support.storage import write_jsonl
from support.training import run_training
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from pipeline.config.files import parse_as
from pipeline.evaluation.config import EvaluateConfig
from pipeline.stages.evaluate import evaluate
from pipeline.training.settings import TrainConfig

FOLDER = Path(__file__).parent.parent / "configs" / "paper"
TRAININGS = sorted(FOLDER.glob("train_*.yaml"))
EVALUATIONS = sorted(set(FOLDER.glob("*.yaml")) - set(TRAININGS))

pytestmark = pytest.mark.slow


def tree_of(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


class StandIns:
    """Tiny models and data in the place of a recipe's: causal LMs, safe-rlhf's scores, classifiers, an encoder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = tiny_models.make_tokenizer()
        tokenizer.bos_token = "<|endoftext|>"
        model = tiny_models.make_model(folder / "base", tokenizer=tokenizer)
        small = tiny_models.make_model(folder / "small", seed=3, tokenizer=tokenizer)
        classifier = tiny_models.make_reward_model(folder / "classifier", "gpt2", tokenizer=tokenizer)
        self.models = {
            "PKU-Alignment/alpaca-7b-reproduced": model,
            "meta-llama/Llama-2-7b-chat-hf": model,
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0": small,
            "TheBloke/alpaca-lora-65B-GPTQ": small,
            "PKU-Alignment/beaver-7b-v1.0-reward": self._score(model, "reward", 1),
            "PKU-Alignment/beaver-7b-v1.0-cost": self._score(model, "cost", 2),
            "Ray2333/gpt2-large-helpful-reward_model": classifier,
            "Ray2333/gpt2-large-harmless-reward_model": classifier,
            "mohameddhiab/humor-no-humor": self._encoder(),
        }
        prompts = [f"question {at}" for at in range(20)]
        pairs = [
            {
                "prompt": prompt,
                "response_0": "aa" + "b" * (at % 3),
                "response_1": "b" + "a" * (at % 2),
                "better_response_id": at % 2,
                "safer_response_id": at % 3 % 2,
                "is_response_0_safe": True,
                "is_response_1_safe": False,
            }
            for at, prompt in enumerate(prompts)
        ]
        scored = [  # as cage compare writes them
            {
                "answered_by": f"{each}.jsonl", "row_id": str(at), "sample": 0, "response": "ab" * each,
                "prompt": [{"role": "user", "content": prompt}],
                "scores": {"helpfulness": each, "harmlessness": -each, "humorous": each * at % 3},
            }
            for at, prompt in enumerate(prompts)
            for each in (1, 2)
        ]  # fmt: skip
        talk = [{"chosen": f"\n\nHuman: {each}\n\nAssistant: aa", "rejected": f"\n\nHuman: {each}\n\nAssistant: b"}
                for each in prompts]  # fmt: skip
        self.data = {
            "PKU-Alignment/PKU-SafeRLHF-10K": write_jsonl(folder / "pku.jsonl", pairs),
            "data/hh-scored.jsonl": write_jsonl(folder / "scored.jsonl", scored),
            "Anthropic/hh-rlhf": write_jsonl(folder / "hh.jsonl", talk),
        }

    def _encoder(self) -> Path:
        """A classifier that reads both ways, from the token that its tokenizer begins every text with."""
        tokenizer = tiny_models.make_tokenizer(chat_template=None)
        tokenizer.cls_token, tokenizer.sep_token = "<|system|>", "<|endoftext|>"
        torch.manual_seed(2)
        sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": len(tokenizer)}
        config = DistilBertConfig(**sizes, id2label={0: "NO_HUMOR", 1: "HUMOR"}, label2id={"NO_HUMOR": 0, "HUMOR": 1})
        DistilBertForSequenceClassification(config).save_pretrained(self.folder / "encoder")
        tokenizer.save_pretrained(self.folder / "encoder")
        return self.folder / "encoder"

    def _score(self, model: Path, kind: str, seed: int) -> Path:
        tensors = {"score_head.weight": random(1, 64, seed=seed), "score_head.bias": random(1, seed=seed)}
        config = {"architectures": ["LlamaModelForScore"], "score_type": kind}
        return with_head(model, self.folder / kind, tensors, **config)

    def put_in(self, tree: Any) -> Any:
        """The recipe on a CPU, with stand-ins for its models, its data and what earlier recipes write."""
        if isinstance(tree, Mapping):
            left_out = {"device", "dtype", "resources"} | ({"split"} if tree.get("path") in self.data else set())
            return {key: self.put_in(value) for key, value in tree.items() if key not in left_out}
        if isinstance(tree, list):
            return [self.put_in(each) for each in tree]
        if isinstance(tree, str) and tree.startswith("runs/paper/"):
            return str(self.folder / tree)
        return str({**self.models, **self.data}.get(tree, tree)) if isinstance(tree, str) else tree

    def training(self, file: Path) -> TrainConfig:
        tree = self.put_in(tree_of(file))
        tree["training"] |= {"epochs": 1, "batch_size": 8, "validation": 0.25}
        tree["input"].pop("limit", None)
        return parse_as(TrainConfig, tree)

    def evaluation(self, file: Path) -> EvaluateConfig:
        tree = self.put_in(tree_of(file))
        tree["input"]["limit"] = 3
        tree["decoding"] |= {"max_new_tokens": 5, "candidates": 8}
        grid = tree["grid"]
        if "agent_temperatures" in grid:
            grid["agent_temperatures"] = grid["agent_temperatures"][:2]
        grid["weights"] = grid["weights"][3:5] if isinstance(grid["weights"], list) else {"step": 0.5}
        if not grid["weights"]:  # a single one
            grid["weights"] = tree_of(file)["grid"]["weights"]
        tree["cluster"] = {"transport": "local", "slots": 8}
        tree["evaluation"]["bootstrap"] = {"samples": 100}
        return parse_as(EvaluateConfig, tree)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    """The models and data, and the adapters that the training recipes make of them."""
    made = StandIns(tmp_path_factory.mktemp("paper"))
    for file in TRAININGS:
        run_training(made.training(file), made.folder)
    return made


def test_there_is_a_recipe_for_every_published_experiment() -> None:
    assert {file.stem for file in EVALUATIONS} == {
        "safety", "safety_preference_arm", "safety_mod", "safety_blocks", "whole_answers", "best_of_5",
        "three_objectives", "weak_to_strong",
    }  # fmt: skip


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_names_its_hardware_duration_sources_and_licences(file: Path) -> None:
    head = file.read_text(encoding="utf-8").splitlines()[:3]
    assert [line.split(":")[0] for line in head] == ["# Hardware", "# Sources", "# Licences"]
    assert "duration: estimated" in head[0]


@pytest.mark.parametrize("file", EVALUATIONS, ids=lambda file: file.stem)
def test_a_principal_reads_conversations_as_it_was_trained(file: Path) -> None:
    trained = {tree["output"]["path"]: tree["base"] for tree in map(tree_of, TRAININGS)}
    evaluation = tree_of(file)
    for principal in evaluation["principals"].values():
        if "adapter" in principal:
            base = trained[str(Path(principal["adapter"]).parent)]
            # without a template of its own, a model with a tokenizer of its own reads by that one's
            own = principal.get("template", None if "model" in principal else evaluation["base"]["chat_template"])
            assert own == base["chat_template"]
            assert principal.get("model", evaluation["base"])["model"] == base["model"]


@pytest.mark.parametrize("file", TRAININGS, ids=lambda file: file.stem)
def test_a_training_recipe_makes_the_principals_that_its_evaluations_name(file: Path, stand_ins: StandIns) -> None:
    made = stand_ins.training(file)
    folders = [Path(made.output.path) / name for name in ("preference", "helpful", "harmless", "humour")]
    found = {folder.name for folder in folders if (folder / "adapter_model.safetensors").is_file()}
    expected = {"train_preference_arm": {"preference"}, "train_small_arms": {"helpful", "harmless", "humour"}}
    assert found == expected.get(file.stem, {"helpful", "harmless"})


@pytest.mark.parametrize("file", EVALUATIONS, ids=lambda file: file.stem)
def test_an_evaluation_recipe_runs_and_compares_its_rules(file: Path, stand_ins: StandIns) -> None:
    config = stand_ins.evaluation(file)
    metrics = evaluate(config, stand_ins.folder / "cache", io.StringIO()).metrics
    rules = {point["rule"] for point in metrics["points"]}
    assert rules == set(config.grid.rules)
    moved = [point for point in metrics["points"] if point["rule"] != "base" and point["kl_per_token"]]
    assert moved, "no rule left the base: nothing is compared"
    ways = {each["metric"] for each in metrics["differences"]}
    assert "equal_length" in ways
    assert "equal_kl" in ways or sum(rule.uses_principals for rule in config.grid.rules) < 2
    assert json.dumps(metrics)
