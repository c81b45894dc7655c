"""Training one adapter for all objectives (PARM): what it gives at each vector, in its own passes and in a run."""

from __future__ import annotations

import json

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of, decode
from support.preference_adapters import merged
from support.training import Said, run_training, training_config, write_rows

from pipeline.errors import Interrupted
from pipeline.training.data import open_preferences, read_data

pytestmark = pytest.mark.slow
OPTIONS = {"loss": "preference_arm", "epochs": 4, "rank": 3, "preference_rank": 2, "learning_rate": 0.02}


def rows_of_opposed_objectives(num_prompts=24):
    """One objective wants the answer of one letter, the other one that of another."""
    return [
        {
            "prompt": f"question {at}", "response_0": "a" * (3 + each), "response_1": "b" * (3 + each),
            "better_response_id": 0, "safer_response_id": 1,
        }
        for at in range(num_prompts)
        for each in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    pairs = write_rows(folder / "pairs.jsonl", rows_of_opposed_objectives())
    config = training_config(pairs, folder / "out", tiny(), **OPTIONS)
    return run_training(config, folder), config, folder


def test_each_unit_vector_orders_pairs_by_its_objective(trained):
    [facts] = trained[0].results
    assert facts["objectives"] == ["better", "safer"]
    for name, other in (("better", "safer"), ("safer", "better")):
        held_out = facts["held_out"][name]
        assert held_out["accuracy"]["backbone"] == 1.0
        assert held_out["other_vectors"][other]["backbone"] == 0.0  # the objectives are opposed


def test_the_report_is_what_the_written_adapter_gives(trained, tiny):
    """PARM's formula on the written file, merged into the weights, against the measured margins."""
    result, config, folder = trained
    from pipeline.training.backbone import find_backbone

    data = read_data(open_preferences(config.input), config, find_backbone(config, NOWHERE).encode)
    for at, name in enumerate(("better", "safer")):
        model = merged(tiny(), folder / "out" / "preference", [float(at == 0), float(at == 1)])
        margins = []
        for pair in data.held_out:
            better = pair.comparison.labels[name]
            totals = []
            for ids in (pair.answer_ids[better], pair.answer_ids[1 - better]):
                with torch.no_grad():
                    logits = model(torch.tensor([[*pair.prompt_ids, *ids]])).logits[0, -len(ids) - 1 : -1]
                totals.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum().item())
            margins.append(totals[0] - totals[1])
        found = result.results[0]["held_out"][name]["margin"]["none"]
        assert found == pytest.approx(sum(margins) / len(margins), rel=1e-3)


def test_a_run_at_own_weights_follows_them(trained, tiny):
    principals = {
        name: {
            "kind": "preference_arm", "adapter": str(trained[2] / "out" / "preference"), "objective": name,
            "preference": "weights",
        }
        for name in ("better", "safer")
    }  # fmt: skip
    decoding = {"max_new_tokens": 8, "rule": "linear", "candidates": "all", "agent_temperature": 0.2}
    ways = {"all_a": {"better": 1.0, "safer": 0.0}, "all_b": {"better": 0.0, "safer": 1.0}}
    rows = [ask(f"{way}{at}", f"question {at}", weights=weights) for way, weights in ways.items() for at in range(3)]
    records = decode(config_of(tiny(), principals, decoding=decoding), rows)

    def count(way, letter):
        return sum(record.response.count(letter) for row_id, record in records.items() if row_id.startswith(way))

    assert count("all_a", "a") > count("all_b", "a")
    assert count("all_b", "b") > count("all_a", "b")


def test_an_interrupted_training_goes_on_to_the_same_adapter(trained, tmp_path):
    _, config, folder = trained
    config = config.model_copy(update={"output": config.output.model_copy(update={"path": str(tmp_path / "out")})})
    with pytest.raises(Interrupted):
        run_training(config, tmp_path, Said("preference: step 9/", Interrupted()))
    run_training(config, tmp_path)
    name = "out/preference/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_missing_label_is_no_label(tiny, tmp_path):
    rows = rows_of_opposed_objectives(12)
    for row in rows[::2]:
        row["safer_response_id"] = None
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    [facts] = run_training(training_config(pairs, tmp_path / "out", tiny(), **OPTIONS), tmp_path).results
    assert facts["held_out"]["safer"]["pairs"] == facts["held_out"]["better"]["pairs"] / 2
    adapter = json.loads((tmp_path / "out" / "preference" / "adapter_config.json").read_text())
    assert (adapter["r1"], adapter["r2"], adapter["objectives"]) == (3, 2, ["better", "safer"])
