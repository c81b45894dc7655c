"""A principal with one more token, or more rows than tokens, pays as it would without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.commands import cage
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pipeline import Aligner
from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.logits_processor import CageLogitsProcessor
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


HOLES = range(NUM_TINY, NUM_TINY + 5)
LAST = "<|last|>"


def holed(folder: Path, target: Path, *, last: int = HOLES[-1] + 1, num_rows: int = 300) -> Path:
    """A model whose last token stands behind ids that no token has, and finds those and its padding likely."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[NUM_TINY:] = 5 * model.lm_head.weight[:1]
        if last < num_rows:
            model.lm_head.weight[last] = model.lm_head.weight[20]
    model.save_pretrained(target)
    plain = tiny_models.make_tokenizer()
    tree = json.loads(plain.backend_tokenizer.to_str())
    tree["model"]["vocab"][LAST] = last
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)), eos_token=plain.eos_token, pad_token=plain.pad_token
    )
    tokenizer.chat_template = plain.chat_template
    tokenizer.save_pretrained(target)
    return target


@pytest.mark.parametrize("attention", ["slots", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("candidates", [50, "all", 266])
def test_ids_without_a_token_are_never_drawn_and_real_tokens_are(tiny, tmp_path, candidates, dtype, attention):
    folder = holed(tiny(), tmp_path / "holed")
    principals = {"kind": {"kind": "prompted", "principle": "be kind"}}
    decoding = {**DECODING, "trace": "tokens", "temperature": 50.0, "max_new_tokens": 100, "candidates": candidates}
    base = {"model": str(folder), "attention": attention, "dtype": dtype}
    with Aligner(base, principals, slots=2, **decoding) as aligner:
        drawn = [token.token_id for answer in aligner.generate(["x"] * 4) for token in answer.tokens]
    assert drawn
    assert not set(drawn) & set(HOLES)
    assert max(drawn) <= HOLES[-1] + 1
    if candidates != 50:
        assert HOLES[-1] + 1 in drawn  # the last token is not cut because others are missing


def test_principals_with_other_weights_share_the_holes(tiny, tmp_path):
    base, kind = holed(tiny(), tmp_path / "base"), holed(tiny(seed=1), tmp_path / "kind", num_rows=280)
    for text, rewards, payments in answers(base, kind):
        assert text is not None
        assert all(value is not None and abs(value) < 1e4 for value in (*rewards.values(), *payments.values()))


def test_existing_answers_may_have_the_last_token(tiny, tmp_path):
    folder = holed(tiny(), tmp_path / "holed")
    with Aligner(str(folder), {"kind": {"kind": "prompted", "principle": "be kind"}}, slots=2) as aligner:
        (rewards,) = aligner.score(["x"], [f"a{LAST}"])
    assert abs(rewards["kind"]) < 1e4


def test_a_token_beyond_the_embedding_is_not_drawn_and_one_that_must_end_answers_is_refused(tiny, tmp_path):
    folder = holed(tiny(), tmp_path / "short", last=400)
    decoding = {**DECODING, "trace": "tokens", "temperature": 50.0, "max_new_tokens": 60, "candidates": "all"}
    with Aligner(str(folder), {}, slots=2, **decoding) as aligner:
        drawn = {token.token_id for answer in aligner.generate(["x"] * 2) for token in answer.tokens}
    assert max(drawn) < NUM_TINY  # the embedding's other rows are padding
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": LAST}))
    (folder / "chat_template.jinja").unlink()  # whose own end of a turn is a token that the model has
    with pytest.raises(
        ConfigurationError, match=r"'<.last.>' \(id 400\), is beyond the embedding of base, which has 300"
    ):
        Aligner(str(folder), {}, slots=2)


def test_the_logits_processor_draws_no_id_without_a_token(tiny, tmp_path):
    folder = holed(tiny(), tmp_path / "holed")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    principals = {"kind": {"kind": "prompted", "principle": "be kind"}}
    processor = CageLogitsProcessor(model, tokenizer, principals, candidates="all")
    inputs = processor.encode(["x"])
    torch.manual_seed(0)
    ids = model.generate(
        **inputs, logits_processor=[processor], do_sample=True, temperature=50.0, top_k=0, max_new_tokens=60,
        num_return_sequences=4,
    )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    assert not set(ids.unique().tolist()) & set(HOLES)
    assert HOLES[-1] + 1 in ids
