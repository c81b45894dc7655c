"""The first token of an answer, for tokenizers that put a space of their own before every text."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny_models
from support.decoding import NOWHERE, ask, config_of, decode
from transformers import AutoTokenizer, LlamaTokenizer

from pipeline.records import Row
from pipeline.runtime.assembly import assemble

BEGIN_LINES = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
BEGIN_WITH_SPACES = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SPACE = "\u2581"


def make_tokenizer(template: str) -> LlamaTokenizer:
    """Every letter is a token with and without a space before it."""
    letters = list(map(chr, range(33, 127)))
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", SPACE, *letters, *(SPACE + letter for letter in letters)]
    tokenizer = LlamaTokenizer(
        vocab={piece: at for at, piece in enumerate(pieces)}, merges=[(SPACE, letter) for letter in letters]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory):
    """spaced(template) is the folder of a random model with such a tokenizer."""

    def make(template: str) -> Path:
        return tiny_models.make_model(
            tmp_path_factory.mktemp("spaced"), scale=2.0, tokenizer=make_tokenizer(template)
        )

    return make


@pytest.mark.parametrize(("template", "first"), [(BEGIN_LINES, "s"), (BEGIN_WITH_SPACES, "\u2581s")])
def test_an_existing_answer_begins_as_the_template_writes_answers(spaced, template: str, first: str) -> None:
    folder = spaced(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompter = assemble(config_of(folder), NOWHERE).prompter
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so it"}]
    [prompt] = prompter.encode(turns[:1], {}).values()
    answer = prompter.encode_answer("so it")
    assert tokenizer.convert_ids_to_tokens(answer[0]) == first
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert whole[len(prompt) :][: len(answer) - 1] == answer[:-1]


RAISES = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no answers') }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("guard", ["", RAISES], ids=["writes other texts", "raises"])
@pytest.mark.parametrize(("end", "first"), [("{{ '\\n' }}", "s"), (" ", "\u2581s"), ("", "s")])
def test_where_a_template_writes_no_answers_they_begin_behind_its_prompt(spaced, guard, end, first) -> None:
    """As Alpaca's, which the recipes have: it knows one instruction, and whatever is last is taken for it."""
    folder = spaced(f"{guard}# Instruction:\n{{{{ messages[-1].content }}}}\n# Response:{end}")
    prompter = assemble(config_of(folder), NOWHERE).prompter
    answer = prompter.encode_answer("so it")
    assert AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(answer[0]) == first


def test_an_answer_that_goes_on_keeps_its_space(spaced) -> None:
    folder = spaced(BEGIN_LINES)
    begun = {"role": "assistant", "content": "so"}
    rows = [Row(f"r{at}", ({"role": "user", "content": "a" * at}, begun)) for at in range(1, 9)]
    decoding = {"rule": "base", "max_new_tokens": 5, "trace": "tokens"}
    records = decode(config_of(folder, decoding=decoding), rows).values()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = tokenizer("so", add_special_tokens=False)["input_ids"]
    texts = [
        tokenizer.decode([*before, *(token.token_id for token in record.tokens)], skip_special_tokens=True)
        for record in records
    ]
    assert any(text.startswith("so ") for text in texts)
    assert [record.response for record in records] == texts


@pytest.mark.parametrize("kind", ["arm", "reward_model"])
def test_a_model_with_such_tokens_reads_answers_as_its_template_writes_them(
    spaced, tiny, tmp_path, kind: str
) -> None:
    if kind == "arm":
        folder = spaced(BEGIN_LINES)
        principal = {"kind": kind, "model": str(folder), "reference": "none"}
    else:
        folder = tiny_models.make_reward_model(tmp_path, tokenizer=make_tokenizer(BEGIN_LINES))
        principal = {"kind": kind, "model": str(folder)}
    assembly = assemble(config_of(tiny("llama"), {"it": {**principal, "weight": 1.0}}), NOWHERE)
    [host] = [spec for spec in assembly.hosts if spec.name != "base"]
    read_by = host.text or host.reward
    answer = assembly.prompter.encode_answer("so it")
    [ids] = read_by.retokeniser.encode([answer])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(ids) == ["s", "o", "\u2581i", "t", "</s>"]
    prompt = assembly.prompter.encode(ask("a", "why").messages, {"it": 1.0})["it"]
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so it"}]
    whole = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    assert [*prompt, *ids] == whole[: len(prompt) + len(ids)]
