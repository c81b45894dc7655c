"""A principal with one more token, or more rows than tokens, pays as it would without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.commands import cage
from transformers import AutoModelForCausalLM

from pipeline import Aligner
from pipeline.config.sections import Config
from pipeline.runtime.replica_plan import plan_replica, resolve_models

NUM_TINY = 261  # five special tokens and 256 bytes
DECODING = {"max_new_tokens": 8, "agent_temperature": 0.5}


def extended(folder: Path, target: Path, *, token: str | None, num_rows: int) -> Path:
    """A model with more rows of embedding and head, which it finds likely, and perhaps one more token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[NUM_TINY:] = 5 * model.lm_head.weight[:1]
    model.save_pretrained(target)
    tokenizer = tiny_models.make_tokenizer()
    if token is not None:
        tokenizer.add_special_tokens({"pad_token": token})
    tokenizer.save_pretrained(target)
    return target


def answers(base: Path, kind: Path) -> list[object]:
    principals = {"kind": {"kind": "tuned_pair", "model": str(kind), "reference": str(base)}}
    with Aligner(str(base), principals, slots=2, **DECODING) as aligner:
        return [
            (answer.text, answer.rewards, answer.payments) for answer in aligner.generate(["hello", "what is ice?"])
        ]


@pytest.mark.parametrize(("token", "num_rows"), [("[PAD]", 262), ("[PAD]", 320), (None, 320)])
@pytest.mark.parametrize("is_base", [False, True])
def test_answers_and_payments_are_those_without_the_tokens(tiny, tmp_path, token, num_rows, is_base):
    base, kind = tiny(), tiny(seed=1)
    expected = answers(base, kind)
    longer = extended(base if is_base else kind, tmp_path / "longer", token=token, num_rows=num_rows)
    found = answers(longer, kind) if is_base else answers(base, longer)
    assert [text for text, *_ in found] == [text for text, *_ in expected]
    for (_, rewards, payments), (_, own_rewards, own_payments) in zip(found, expected, strict=True):
        assert rewards == pytest.approx(own_rewards, abs=1e-4)
        assert payments == pytest.approx(own_payments, abs=1e-4)


def test_the_plan_names_the_tokens_that_answers_do_without(tiny, tmp_path):
    kind = extended(tiny(seed=1), tmp_path / "kind", token="[PAD]", num_rows=320)
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    job = {
        "input": {"path": str(tmp_path / "in.jsonl")},
        "output": {"path": str(tmp_path / "out")},
        "base": {"model": str(tiny())},
        "principals": {"kind": {"kind": "tuned_pair", "model": str(kind), "reference": str(tiny())}},
        "cluster": {"transport": "local"},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    done = cage("plan", "-c", str(tmp_path / "job.yaml"))
    assert done.returncode == 0, done.stderr
    assert "and base share all tokens but 1 id: 261 ('[PAD]'); no answer has these" in done.stdout
    config = Config.model_validate(job)
    replica = plan_replica(config, resolve_models(config, tmp_path), tmp_path)
    assert {spec.vocab_size for spec in replica.hosts} == {NUM_TINY}
    assert list(replica.masked.values()) == [{NUM_TINY: "[PAD]"}]
