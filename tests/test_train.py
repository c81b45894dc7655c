"""`cage train`: what it trains is what it says, goes on where it stopped, and is what `kind: arm` takes."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from support.commands import cage
from support.decoding import NOWHERE, ask, config_of, decode
from support.training import Said, pair_rows, run_training, training_config, write_rows
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from pipeline.config.files import parse_config
from pipeline.config.sections import Transport
from pipeline.errors import ConfigurationError, Interrupted, RunMismatch
from pipeline.runtime.assembly import assemble
from pipeline.training.data import open_preferences, read_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A finished training, its configuration and its folder."""
    folder = tmp_path_factory.mktemp("trained")
    config = training_config(write_rows(folder / "pairs.jsonl", pair_rows()), folder / "out", tiny(), epochs=3)
    return run_training(config, folder), config, folder


def backbone_of(config):
    from pipeline.training.backbone import find_backbone

    return find_backbone(config, NOWHERE)


def plain_logprob(model, prompt_ids, answer_ids):
    """The log-likelihood of an answer by a plain forward pass."""
    ids = torch.tensor([[*prompt_ids, *answer_ids]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[0, 1:, None])[len(prompt_ids) - 1 :].sum().item()


def with_adapter(base, folder):
    import peft

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def test_it_learns_what_the_pairs_say(trained):
    held_out = trained[0].results[0]["held_out"]["preferred"]
    assert held_out["pairs"] == 12
    assert held_out["accuracy"]["backbone"] == 1.0
    assert held_out["margin"]["backbone"] > 1
    assert trained[0].was_trained


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_report_says_what_plain_forward_passes_say(trained, tiny):
    result, config, folder = trained
    backbone = backbone_of(config)
    data = read_data(open_preferences(config.input), config, backbone.encode)
    own, before = with_adapter(tiny(), folder / "out" / "preferred"), AutoModelForCausalLM.from_pretrained(tiny())
    margins = {"none": [], "backbone": []}
    for pair in data.held_out:
        found = [[plain_logprob(model, pair.prompt_ids, ids) for ids in pair.answer_ids] for model in (own, before)]
        margins["none"].append(found[0][0] - found[0][1])
        margins["backbone"].append(margins["none"][-1] - (found[1][0] - found[1][1]))
    held_out = result.results[0]["held_out"]["preferred"]
    for reference, values in margins.items():
        assert held_out["margin"][reference] == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert held_out["accuracy"][reference] == sum(value > 0 for value in values) / len(values)
    losses = [-logsigmoid(torch.tensor(0.05 * value)).item() for value in margins["none"]]
    assert held_out["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_first_loss_is_that_of_the_backbone(tiny, tmp_path):
    """-log sigmoid(beta (log p(chosen) - log p(rejected))) of a plain forward pass, before the first step."""
    rows = pair_rows(2)[:2]
    config = training_config(
        write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out", tiny(), validation=0, batch_size=2, epochs=1,
        beta=0.2, length_normalization=True,
    )  # fmt: skip
    data = read_data(open_preferences(config.input), config, backbone_of(config).encode)
    model = AutoModelForCausalLM.from_pretrained(tiny())
    losses = []
    for pair in data.train:
        chosen, rejected = (plain_logprob(model, pair.prompt_ids, ids) / len(ids) for ids in pair.answer_ids)
        losses.append(math.log1p(math.exp(-0.2 * (chosen - rejected))))
    [facts] = run_training(config, tmp_path).results
    assert facts["steps"] == 1
    assert facts["training_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert facts["held_out"] == {}


def test_pairs_are_encoded_as_a_run_encodes(trained, tiny):
    result, _, folder = trained
    principals = {"preferred": {"kind": "arm", "adapter": str(folder / "out" / "preferred")}}
    run = assemble(config_of(tiny(), principals), NOWHERE)
    for pair in result.data.train[:5]:
        prompts = run.prompter.encode(pair.comparison.prompt, {"preferred": 1.0})
        assert all(list(ids) == pair.prompt_ids for ids in prompts.values())
        assert [run.prompter.encode_answer(answer.text) for answer in pair.comparison.answers] == list(
            pair.answer_ids
        )
        assert all(ids[-1] in run.prompter.stop_ids for ids in pair.answer_ids)


def test_a_run_steers_by_what_was_trained(trained, tiny):
    folder = trained[2]
    adapter = {"kind": "arm", "adapter": str(folder / "out" / "preferred"), "reference": "backbone"}
    decoding = {"max_new_tokens": 8, "rule": "linear", "candidates": "all", "agent_temperature": 0.2}
    counts = []
    for weight in (0.0, 1.0):
        config = config_of(tiny(), {"preferred": adapter | {"weight": weight}}, decoding=decoding)
        rows = [ask(f"r{at}", f"question {at}") for at in range(4)]
        counts.append(sum(record.response.count("a") for record in decode(config, rows).values()))
    assert counts[1] > counts[0] + 8


def test_an_adapter_for_another_base_is_refused(trained, tiny):
    principals = {"preferred": {"kind": "arm", "adapter": str(trained[2] / "out" / "preferred")}}
    with pytest.raises(ConfigurationError, match=r"was trained on .*, whose content is not that of"):
        assemble(config_of(tiny(seed=3), principals), NOWHERE)


def test_an_interrupted_training_goes_on_to_the_same_adapter(trained, tiny, tmp_path):
    config = trained[1].model_copy(
        update={"output": trained[1].output.model_copy(update={"path": str(tmp_path / "out")})}
    )
    with pytest.raises(Interrupted):
        run_training(config, tmp_path, Said("preferred: step 9/", Interrupted()))
    assert not (tmp_path / "out" / "preferred").exists()
    # one that was cut off while it was written
    (tmp_path / "out" / "_training" / "preferred" / "checkpoint-99").mkdir()
    out = Said()
    assert run_training(config, tmp_path, out).was_trained
    assert "goes on from checkpoint-" in out.getvalue()
    name = "preferred/adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (trained[2] / "out" / name).read_bytes()
    # peft keeps a set: its order is another one in every process, and a run would take it for another adapter
    targets = json.loads((tmp_path / "out" / "preferred" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    assert not list((tmp_path / "out" / "_training").iterdir())


def test_a_finished_training_is_not_repeated_and_another_one_is_refused(trained):
    _, config, folder = trained
    again = run_training(config, folder)
    assert not again.was_trained
    other = config.model_copy(update={"training": config.training.model_copy(update={"rank": 3})})
    with pytest.raises(RunMismatch, match=r"training\.rank: 8 -> 3"):
        run_training(other, folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pairs_beyond_the_context_of_the_model_are_counted(tiny, tmp_path, kind):
    """Of a model with rotary positions they were trained on, and of another one they were a traceback."""
    rows = [*pair_rows(8), {"prompt": "long", "chosen": "a" * 600, "rejected": "b"}]
    config = training_config(write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out", tiny(kind))
    assert config.training.max_length > 600
    data = read_data(open_preferences(config.input), config, backbone_of(config).encode)
    assert data.drops.counts == {"the model cannot read it": 1}
    [said] = data.drops.describe()
    assert "an answer has 601 tokens and the model's context holds" in said


def test_other_system_messages_are_another_training(tiny, tmp_path):
    rows = [{**row, "system": "be brief", "rules": "be long"} for row in pair_rows(8)]
    config = training_config(write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "out", tiny())
    with pytest.raises(Interrupted):
        run_training(config, tmp_path, Said("preferred: step", Interrupted()))
    other = config.model_copy(update={"input": config.input.model_copy(update={"system": "rules"})})
    with pytest.raises(RunMismatch, match=r"input\.system: 'system' -> 'rules'"):
        run_training(other, tmp_path)


def test_an_output_with_other_files_is_refused(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    config = trained[1].model_copy(update={"output": trained[1].output.model_copy(update={"path": str(tmp_path)})})
    with pytest.raises(ConfigurationError, match=r"holds other files and no training \(mine.txt\)"):
        run_training(config, tmp_path)


def test_an_output_with_a_run_is_refused(trained, tmp_path):
    (tmp_path / "_plan.json").write_text('{"fingerprint": []}')
    config = trained[1].model_copy(update={"output": trained[1].output.model_copy(update={"path": str(tmp_path)})})
    with pytest.raises(ConfigurationError, match="holds something else than a training"):
        run_training(config, tmp_path)


def test_modules_that_are_not_there_are_refused(tiny, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(4))
    config = training_config(pairs, tmp_path / "out", tiny(), target_modules="no_proj")
    with pytest.raises(ConfigurationError, match="no_proj"):
        run_training(config, tmp_path)


def test_dpo_learns_against_the_backbone(tiny, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows())
    [facts] = run_training(training_config(pairs, tmp_path / "out", tiny(), loss="dpo"), tmp_path).results
    assert facts["held_out"]["preferred"]["accuracy"]["backbone"] == 1.0
    assert facts["beta"] == 0.1
    assert facts["training_loss"] < math.log(2)


def test_several_objectives_give_an_adapter_each(tiny, tmp_path):
    rows = [
        {
            "prompt": f"q{at}", "response_0": "a" * 4, "response_1": "b" * 4,
            "better_response_id": 0, "safer_response_id": 1,
        }
        for at in range(16)
    ]  # fmt: skip
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    found = run_training(training_config(pairs, tmp_path / "out", tiny(), epochs=2), tmp_path).results
    assert [facts["name"] for facts in found] == ["better", "safer"]
    accuracies = [facts["held_out"][facts["name"]]["accuracy"]["backbone"] for facts in found]
    assert accuracies == [1.0, 1.0]  # though they are opposed
    for name in ("better", "safer"):
        adapter = json.loads((tmp_path / "out" / name / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(tiny())


def test_the_command_ends_with_lines_that_are_a_configuration(tiny, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(8))
    tree = training_config(pairs, tmp_path / "out", tiny()).model_dump(mode="json")
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(tree))
    done = cage("train", "-c", str(file))
    assert done.returncode == 0, done.stderr
    before, _, lines = done.stdout.partition("in a configuration:\n")
    assert "on 4 held-out pairs accuracy" in before
    assert "loss" in done.stderr
    assert "left" in done.stderr
    section = yaml.safe_load(lines)
    run = parse_config({"input": {"path": str(pairs), "prompt": "prompt"}, "output": {"path": "x"}, **section})
    assemble(run, NOWHERE)


@pytest.mark.nightly
@pytest.mark.ray
def test_objectives_that_are_trained_on_actors_are_those_of_one_process(tiny, tmp_path, ray_cluster):
    rows = [
        {
            "prompt": f"q{at}", "response_0": "a" * 4, "response_1": "b" * 4,
            "better_response_id": 0, "safer_response_id": 1,
        }
        for at in range(8)
    ]  # fmt: skip
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    local = training_config(pairs, tmp_path / "local", tiny())
    config = training_config(pairs, tmp_path / "ray", tiny())
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"transport": Transport.RAY})})
    out = Said()
    for each in (config, local):
        assert run_training(each, tmp_path, out).was_trained
    for name in ("better/adapter_model.safetensors", "safer/adapter_model.safetensors"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert "safer: step" in out.getvalue()
