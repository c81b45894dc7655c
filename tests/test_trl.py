"""A run's files train with TRL as they are: one step of SFT and one of DPO."""

from __future__ import annotations

import json

import pytest
from datasets import load_dataset
from support.runs import job, run_job
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [
    pytest.mark.slow,
    # warnings of the trainers' own libraries
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """The folder of a run whose input brought answers to all rows but one."""
    folder = tmp_path_factory.mktemp("trl")
    answers = ["answer 0", "answer 1", None, "answer 3", "answer 4", "answer 5"]
    rows = [{"id": str(at), "prompt": "hello " * at + "?", "answer": answer} for at, answer in enumerate(answers)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_job(job(folder / "prompts.jsonl", folder / "run", tiny(), input={"response": "answer"}), folder)
    return folder / "run"


def loaded(folder, name):
    return load_dataset(str(folder), name, split="train", cache_dir=str(folder.parent / "hf"))


def options(tmp_path):
    return {
        "output_dir": str(tmp_path), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [],
        "use_cpu": True, "bf16": False, "save_strategy": "no", "max_length": 64, "disable_tqdm": True,
    }  # fmt: skip


def test_sft_takes_prompt_and_completion(written, tiny, tmp_path):
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(tiny())
    trainer = SFTTrainer(
        model, args=SFTConfig(**options(tmp_path)), train_dataset=loaded(written, "default"),
        processing_class=AutoTokenizer.from_pretrained(tiny()),
    )  # fmt: skip
    assert trainer.completion_only_loss
    assert trainer.train().global_step == 1


def test_dpo_takes_chosen_and_rejected(written, tiny, tmp_path):
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(tiny())
    pairs = loaded(written, "pairs")
    assert len(loaded(written, "default")) == 6
    assert len(pairs) in (4, 5)  # the row without an answer has none, nor one that was drawn just as it was
    trainer = DPOTrainer(
        model, args=DPOConfig(**options(tmp_path)), train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(tiny()),
    )  # fmt: skip
    assert trainer.train().global_step == 1


def test_dpo_refuses_the_answers_and_the_card_says_what_to_load(written, tiny, tmp_path):
    from trl import DPOConfig, DPOTrainer

    rows = loaded(written, "default")
    assert None in rows["chosen"][:]
    with pytest.raises(TypeError):
        DPOTrainer(
            AutoModelForCausalLM.from_pretrained(tiny()), args=DPOConfig(**options(tmp_path)), train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tiny()),
        ).train()  # fmt: skip
    assert "such as TRL's DPOTrainer, are given `pairs`" in (written / "_README.md").read_text()
