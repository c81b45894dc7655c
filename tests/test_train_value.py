"""Training a value head: what it foretells, and that kind `value` reads it as it was trained."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.decoding import NOWHERE, ask, config_of, decode
from support.training import Said, run_training, training_config, write_rows
from transformers import AutoModelForCausalLM

from pipeline.errors import ConfigurationError, Interrupted, RunMismatch
from pipeline.runtime.assembly import assemble
from pipeline.training.comparisons import Answer, Comparison
from pipeline.training.data import EncodedPair
from pipeline.training.fit import Task, make_arguments
from pipeline.training.folders import TrainingFolder
from pipeline.training.settings import TrainingConfig
from pipeline.training.value import values_of

pytestmark = pytest.mark.slow
OPTIONS = {"loss": "value", "epochs": 12, "learning_rate": 0.01, "rank": 4}


def scored_rows(num_prompts=20):
    """Answers of one letter are worth 3, those of another -1."""
    return [
        {"prompt": f"question {at}", "response": letter * (3 + at % 3), "score": score}
        for at in range(num_prompts)
        for letter, score in (("a", 3.0), ("b", -1.0))
    ]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    pairs = write_rows(folder / "pairs.jsonl", scored_rows())
    source = {"response": "response", "scores": {"worth": "score"}}
    config = training_config(pairs, folder / "out", tiny(), source=source, **OPTIONS)
    return run_training(config, folder), config, folder


def test_it_foretells_held_out_returns(trained):
    [facts] = trained[0].results
    held_out = facts["held_out"]["worth"]
    assert held_out["answers"] == 10
    assert held_out["explained"]["end"] > 0.9
    assert held_out["explained"]["prompt"] < 0.2  # before the answer nothing tells them apart
    assert held_out["accuracy"]["value"] == 1.0
    assert held_out["mean_return"] == 1.0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_run_values_answers_by_the_written_head_in_the_units_of_returns(trained, tiny):
    """q summed over an answer is V(answer) - V(prompt) by a plain forward pass of the written files."""
    import peft

    folder = trained[2] / "out" / "worth"
    principals = {"worth": {"kind": "value", "adapter": str(folder), "candidates": 300}}
    config = config_of(tiny(), principals, decoding={"max_new_tokens": 4, "agent_temperature": 0.5})
    assembly = assemble(config, NOWHERE)
    row = ask("r", "question 1", response="aaaa")
    record = decode(config, [row])["r"]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny()), folder).eval()
    head = load_file(folder / "value_head.safetensors")
    assert {key: list(value.shape) for key, value in head.items()} == {"weight": [1, 64], "bias": [1]}
    prompt = assembly.prompter.encode(row.messages, {"worth": 1.0})["base"]
    ids = assembly.prompter.encode_answer("aaaa")
    with torch.no_grad():
        hidden = model(torch.tensor([[*prompt, *ids]]), output_hidden_states=True).hidden_states[-1][0]
    values = (hidden @ head["weight"].T + head["bias"])[:, 0]
    assert values[-1].item() == pytest.approx(3.0, abs=0.7)
    expected = values[-1] - values[len(prompt) - 1]
    assert record.original_rewards["worth"] == pytest.approx(expected.item(), abs=1e-3)
    assert record.rewards["worth"] is not None


def test_an_interrupted_training_goes_on_to_the_same_head(trained, tmp_path):
    _, config, folder = trained
    config = config.model_copy(update={"output": config.output.model_copy(update={"path": str(tmp_path / "out")})})
    with pytest.raises(Interrupted):
        run_training(config, tmp_path, Said("worth: step 20/", Interrupted()))
    out = Said()
    run_training(config, tmp_path, out)
    assert "goes on from" in out.getvalue()
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "out" / "worth" / name).read_bytes() == (folder / "out" / "worth" / name).read_bytes()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_learning_rate_rises_over_its_share_of_the_steps(tmp_path):
    """A step is one of answers, of which there are twice as many as pairs here."""
    answers = [(Answer("a", {"worth": 3.0}), Answer("b", {"worth": -1.0}))] * 40
    pairs = [
        EncodedPair(Comparison("", "", (), both, {"worth": 0}), [at], ([1], [2])) for at, both in enumerate(answers)
    ]
    backbone = SimpleNamespace(spec=SimpleNamespace(dtype="float32"), device=torch.device("cpu"))
    folder = TrainingFolder.at(str(tmp_path / "out"))
    training = TrainingConfig(loss="value", epochs=2, batch_size=8, warmup=0.25)
    arguments = make_arguments(Task("worth", backbone, training, pairs, (), folder, ("worth",)))
    assert arguments.warmup_steps == 5  # of 20
    assert arguments.save_steps == 2


def test_a_judge_gives_returns_where_the_data_have_none(tiny, tmp_path):
    rows = [{"prompt": f"q{at}", "chosen": "b b b", "rejected": "a"} for at in range(12)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    judged = {"loss": "value", "epochs": 1, "judge": {"kind": "brevity", "half_words": 2}}
    [facts] = run_training(training_config(pairs, tmp_path / "out", tiny(), **judged), tmp_path).results
    assert facts["name"] == "brevity"
    assert facts["held_out"]["brevity"]["answers"] == 6
    assert not (tmp_path / "out" / "preferred").exists()
    adapter = json.loads((tmp_path / "out" / "brevity" / "adapter_config.json").read_text())
    assert adapter["modules_to_save"] is None


def test_why_a_judge_has_no_score_is_said(tiny, tmp_path):
    rows = [{"prompt": f"q{at}", "chosen": "b b b", "rejected": "a"} for at in range(12)]
    pairs, code = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "judges.py"
    code.write_text("def odd(answers):\n    return [float('nan') if each.text == 'a' else 1 for each in answers]\n")
    judged = {"loss": "value", "judge": {"kind": "function", "function": f"{code}:odd"}}
    reason = r"12 dropped: an answer that the judge cannot score \(first: row 1 of pairs.jsonl: it returned nan\)"
    with pytest.raises(ConfigurationError, match=reason):
        run_training(training_config(pairs, tmp_path / "out", tiny(), **judged), tmp_path)


def test_a_training_does_not_go_on_with_other_scores_of_its_judge(tiny, tmp_path):
    rows = [{"prompt": f"q{at}", "chosen": "b b b", "rejected": "a"} for at in range(12)]
    pairs, code = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "judges.py"
    code.write_text("def long(answers):\n    return [len(each.text) for each in answers]\n", encoding="utf-8")
    judged = {"loss": "value", "epochs": 1, "judge": {"kind": "function", "function": f"{code}:long"}}
    config = training_config(pairs, tmp_path / "out", tiny(), **judged)
    with pytest.raises(Interrupted):
        run_training(config, tmp_path, Said("function: step", Interrupted()))
    code.write_text("def long(answers):\n    return [-len(each.text) for each in answers]\n", encoding="utf-8")
    with pytest.raises(RunMismatch, match=r"training\.judge\.scores"):
        run_training(config, tmp_path)


def test_values_are_float32_in_mixed_precision_too():
    class Headed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value_head = torch.nn.Linear(16, 1)

        def get_base_model(self):
            return self

        def forward(self, input_ids, **_):
            return SimpleNamespace(hidden_states=[torch.linspace(0, 1, 48).view(1, 3, 16)])

    model, ids = Headed(), torch.ones(1, 3, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = values_of(model, inputs)
    assert torch.equal(mixed, values_of(model, inputs))


@pytest.mark.parametrize(("other", "counted"), [(1.0, 0), (None, 12)])
def test_returns_that_are_all_equal_are_refused_and_missing_ones_counted(tiny, tmp_path, other, counted):
    rows = [
        {"prompt": f"q{at}", "chosen": "b", "rejected": "a", "score_chosen": 1.0, "score_rejected": other}
        for at in range(12)
    ]
    config = training_config(write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out", tiny(), loss="value")
    with pytest.raises(
        ConfigurationError, match="all answers of preferred have the score 1: no value can be learned"
    ):
        run_training(config, tmp_path)
    rows[0]["score_chosen"] = 2.0
    rows[1]["score_chosen"] = 2.0
    config = training_config(write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out", tiny(), loss="value")
    trained = run_training(config, tmp_path)
    assert trained.data.drops.counts["an answer without a score for preferred"] == counted


def test_pairs_without_scores_are_refused(tiny, tmp_path):
    rows = [{"prompt": f"q{at}", "chosen": "b", "rejected": "a"} for at in range(12)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ConfigurationError, match="loss: value needs a score of every answer"):
        run_training(training_config(pairs, tmp_path / "out", tiny(), loss="value"), tmp_path)
