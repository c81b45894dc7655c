"""Reward models as judges: pooled at the right token, whatever the padding is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from support.heads import PlainStates, random, with_head
from support.judge_models import save_reward_model
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.interface import JudgedAnswer
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.evaluation.panel import resolve_panel

JUDGES = TypeAdapter(AnyJudge)
QUESTION = ({"role": "user", "content": "Is it so?"},)
TEXTS = ["Yes.", "It is, and for a great many reasons.", "", "No!", "Perhaps, perhaps not."]
ANSWERS = [JudgedAnswer(QUESTION, text) for text in TEXTS]


def judge(folder: Path, **section):
    config = JUDGES.validate_python({"kind": "reward_model", "model": str(folder), **section})
    return resolve_panel({"rm": config}, folder / "cache").load()["rm"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_batches_score_as_single_texts_do_where_the_padding_ends_a_text_too(kind, tmp_path):
    folder = save_reward_model(tmp_path, kind)
    seated = judge(folder, batch_size=5)
    assert seated.conversations.tokenizer.pad_token_id == seated.conversations.tokenizer.eos_token_id == 0
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain.config.pad_token_id = None  # then transformers reads the last token, of a single text
    alone, by_token_id = [], []
    for text in TEXTS:
        turns = [*QUESTION, {"role": "assistant", "content": text}]
        ids = seated.conversations.tokenizer(
            seated.conversations.tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False
        )["input_ids"]
        assert ids[-1] == 0
        with torch.inference_mode():
            alone.append(plain(input_ids=torch.tensor([ids])).logits[0, 0].item())
            plain.config.pad_token_id = 0
            by_token_id.append(plain(input_ids=torch.tensor([ids])).logits[0, 0].item())
            plain.config.pad_token_id = None
    assert seated.score(ANSWERS) == pytest.approx(alone, abs=1e-5)
    assert judge(folder, batch_size=2).score(ANSWERS) == pytest.approx(alone, abs=1e-5)
    assert max(abs(one - other) for one, other in zip(alone, by_token_id, strict=True)) > 1e-3


def test_an_encoder_scores_prompt_and_answer_as_a_pair(tmp_path):
    folder = save_reward_model(tmp_path, "bert")
    seated = judge(folder, batch_size=5)
    alone = [
        seated.found.model(**seated.conversations.tokenizer("Is it so?", text, return_tensors="pt")).logits.item()
        for text in TEXTS
    ]
    assert seated.score(ANSWERS) == pytest.approx(alone, abs=1e-5)


def test_an_encoder_is_told_which_tokens_are_the_answers(tmp_path):
    folder = save_reward_model(tmp_path, "bert")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]  # as BERT's own tokenizer has them
    tokenizer = AutoTokenizer.from_pretrained(folder, model_input_names=inputs)
    end = tokenizer.convert_ids_to_tokens(0)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, 0)]
    )
    tokenizer.save_pretrained(folder)
    seated = judge(folder, batch_size=5)
    alone, unmarked = [], []
    for text in TEXTS:
        pair = seated.conversations.tokenizer("Is it so?", text, return_tensors="pt")
        assert bool(pair["token_type_ids"].any()) == bool(text)  # nothing is no second text
        with torch.inference_mode():
            alone.append(seated.found.model(**pair).logits.item())
            unmarked.append(seated.found.model(input_ids=pair["input_ids"]).logits.item())
    assert seated.score(ANSWERS) == pytest.approx(alone, abs=1e-5)
    assert max(abs(one - other) for one, other in zip(alone, unmarked, strict=True)) > 1e-4


def test_an_encoder_whose_positions_begin_later_reads_fewer_tokens(tmp_path):
    """RoBERTa's first token is at the position behind that of padding, so that its last positions are no tokens'."""
    seated = judge(save_reward_model(tmp_path, "roberta", context=64))
    fits, not_quite = (JudgedAnswer(QUESTION, "x" * (count - len("Is it so?"))) for count in (63, 64))
    found = seated.score([fits, not_quite])
    assert math.isfinite(found[0])
    assert found[1].reason == "the text has 64 tokens, too many"


PHI_LIKE = (
    "{% for m in messages %}{% if m.role != 'system' %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
DATED = (
    "{{ strftime_now('%Y') }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{{ mood }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def text_of(seated, prompt, answer):
    ids = seated.conversations.encode(JudgedAnswer(prompt, answer))
    tokens = seated.conversations.tokenizer.convert_ids_to_tokens(ids)
    return "".join(tokens).replace("Ġ", " ").replace("Ċ", "\n"), ids


def test_a_judge_reads_conversations_by_the_rules_of_prompts(tmp_path):
    folder = save_reward_model(tmp_path, context=512)
    seated = judge(folder, chat_template=PHI_LIKE)
    said = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "so? <|end|> yes"})
    text, ids = text_of(seated, said, "Yes.")
    # a system message that the template drops is in the first user message, the end of the turn is the last token
    assert text == "<|user|>be brief\n\nso? <|end|> yes<|end|>\n<|assistant|>Yes.<|end|>"
    assert ids.count(0) == 2  # what the user spelled is text


def test_a_judge_s_template_is_given_values_and_the_stated_time(tmp_path):
    folder = save_reward_model(tmp_path, context=512)
    options = {"chat_template": DATED, "chat_template_kwargs": {"mood": "!"}}
    seated = judge(folder, **options, chat_template_time="2026-01-31")
    assert text_of(seated, QUESTION, "Yes.")[0] == "2026<|user|>Is it so?<|end|><|assistant|>Yes.<|end|>!"
    with pytest.raises(ConfigurationError, match=r"judge rm\.chat_template_time is missing: the chat template asks"):
        judge(folder, **options)
    with pytest.raises(ConfigurationError, match=r"judge rm\.chat_template_kwargs\.tone has no effect"):
        judge(folder, chat_template_kwargs={"tone": "!"})
    with pytest.raises(ConfigurationError, match=r"judge rm\.chat_template_time has no effect"):
        judge(folder, chat_template_time="2026-01-31")


def test_calls_of_tools_are_read_as_the_output_stores_them(tmp_path):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}"
        "{% for c in m.tool_calls %}{{ c.function.arguments.x }}{% endfor %}{% endif %}<|end|>{% endfor %}"
    )
    seated = judge(save_reward_model(tmp_path, context=512), chat_template=template)
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    prompt = (
        {"role": "user", "content": "x", "tool_calls": None, "tool_call_id": None, "name": None},
        {"role": "assistant", "content": "", "tool_calls": [call], "tool_call_id": None, "name": None},
        {"role": "tool", "content": "8", "tool_calls": None, "tool_call_id": None, "name": None},
    )
    assert (
        text_of(seated, prompt, "y")[0]
        == "<|user|>x<|end|><|assistant|>7<|end|><|tool|>8<|end|><|assistant|>y<|end|>"
    )


def test_sign_scale_and_label_are_declared(tmp_path):
    folder = save_reward_model(tmp_path, num_labels=3)
    plain = judge(folder, label=2).score(ANSWERS)
    turned = judge(folder, label=2, sign="lower", scale=2.5).score(ANSWERS)
    assert turned == pytest.approx([-2.5 * score for score in plain])
    assert judge(folder, label=0).score(ANSWERS) != pytest.approx(plain)


def test_what_cannot_be_scored_has_no_score_and_costs_its_neighbours_nothing(tmp_path):
    folder = save_reward_model(tmp_path, context=64)
    long = JudgedAnswer(QUESTION, "x" * 100)
    found = judge(folder).score([ANSWERS[0], long, ANSWERS[1]])
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx(judge(folder).score(ANSWERS[:2]), abs=1e-6)
    refusing = judge(folder, chat_template="{% if messages %}{{ raise_exception('no') }}{% endif %}")
    assert all(map(math.isnan, refusing.score(ANSWERS)))


def test_scores_belong_to_the_weights_and_not_to_their_place(tmp_path):
    digests = set()
    for name, section in (("a", {}), ("b", {"batch_size": 1}), ("c", {"sign": "lower"})):
        folder = save_reward_model(tmp_path / name)
        config = JUDGES.validate_python({"kind": "reward_model", "model": str(folder), **section})
        digests.add(resolve_panel({"rm": config}, tmp_path).digest)
    assert len(digests) == 2


def test_models_that_give_no_scores_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigurationError, match=r"judge rm: .* is LlamaForCausalLM; a reward model is a sequence"):
        judge(tiny())
    with pytest.raises(ConfigurationError, match=r"judge rm.label must be one of 0 \(LABEL_0\); got 1"):
        judge(save_reward_model(tmp_path / "one"), label=1)
    headless = save_reward_model(tmp_path / "headless")
    from safetensors.torch import load_file, save_file

    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"its files lack 1 weight \(score\.weight\), which would be random"):
        judge(headless)


def test_heads_of_other_makes_judge_whole_answers(tiny, tmp_path):
    source, plain = tiny("llama", seed=4), PlainStates(tiny("llama", seed=4))
    weight, bias = random(3, 64, seed=1), random(3, seed=2)

    def ids(text):
        turns = [*QUESTION, {"role": "assistant", "content": text}]
        rendered = plain.tokenizer.apply_chat_template(turns, tokenize=False)
        return plain.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    trl = {"v_head.summary.weight": weight[:1], "v_head.summary.bias": bias[:1]}
    folder = with_head(source, tmp_path / "trl", trl, drop=())
    expected = [(weight[0] @ plain.last(ids(text)) + bias[0]).item() for text in TEXTS]
    assert judge(folder).score(ANSWERS) == pytest.approx(expected, abs=1e-4)
    names = {"0": "kind", "1": "brief", "2": "true"}
    several = with_head(
        source, tmp_path / "several", {"regression_head.weight": weight, "regression_head.bias": bias}, id2label=names
    )
    expected = [(weight[1] @ plain.last(ids(text)) + bias[1]).item() for text in TEXTS]
    assert judge(several, label="brief").score(ANSWERS) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigurationError, match=r"judge rm.label is missing: the model has 3 outputs, 0 \(kind\)"):
        judge(several)
    with pytest.raises(ConfigurationError, match=r"judge rm.label must be one of 0 \(kind\).*; got 'rude'"):
        judge(several, label="rude")


def test_a_model_that_was_trained_at_the_end_of_a_text_judges_there(tiny, tmp_path):
    source, plain, weight = tiny("llama", seed=4), PlainStates(tiny("llama", seed=4)), random(1, 64, seed=1)
    folder = with_head(source, tmp_path / "rlhf", {"score_head.weight": weight}, architectures=["LlamaForScore"])
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    expected = []
    for text in TEXTS:
        ids = plain.tokenizer(f"Is it so? {text} ", add_special_tokens=False)["input_ids"]
        expected.append((weight[0] @ plain.last([*ids, plain.tokenizer.eos_token_id])).item())
    assert judge(folder, chat_template=template).score(ANSWERS) == pytest.approx(expected, abs=1e-4)


def test_an_encoders_outputs_have_names_too(tmp_path):
    folder = save_reward_model(tmp_path, "bert", num_labels=2)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": {"0": "bad", "1": "good"}}))
    assert judge(folder, label="good").score(ANSWERS) == judge(folder, label=1).score(ANSWERS)
    assert judge(folder, label="good").score(ANSWERS) != judge(folder, label="bad").score(ANSWERS)


def test_an_answer_without_a_score_has_a_reason(tmp_path):
    folder = save_reward_model(tmp_path, context=64)
    [found] = judge(folder).score([JudgedAnswer(QUESTION, "x" * 100)])
    assert found.reason == "the text has 113 tokens, too many"
    [found] = judge(folder, chat_template="{% if messages %}{{ raise_exception('no') }}{% endif %}").score(
        ANSWERS[:1]
    )
    assert found.reason == "the chat template refuses it (TemplateError: no)"
