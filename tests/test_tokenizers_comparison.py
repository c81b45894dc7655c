"""Tokenizers of one run hold the same tokens; a difference is reported with its ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, PreTrainedTokenizerFast

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import context_length, read_model_facts
from pipeline.hub.sources import ModelSource, resolve_model
from pipeline.hub.tokenizer_facts import facts_of_tokenizer, load_tokenizer, read_tokenizer_facts
from pipeline.hub.tokenizers import compare_tokenizers, stop_token_ids

Tiny = Callable[..., Path]
NUM_TINY = 261  # five special tokens and 256 bytes


def difference(base: Any, other: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        compare_tokenizers(facts_of_tokenizer(base), facts_of_tokenizer(other), "base", "kind (small)")
    return str(caught.value)


def renamed(tokenizer: PreTrainedTokenizerFast, names: dict[str, str]) -> PreTrainedTokenizerFast:
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree["model"]["vocab"] = {names.get(token, token): i for token, i in tree["model"]["vocab"].items()}
    return PreTrainedTokenizerFast(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(tree)))


def source_of(folder: Path) -> ModelSource:
    return resolve_model(str(folder), cache_folder=folder)


def test_the_same_tokens_are_no_difference() -> None:
    plain = tiny_models.make_tokenizer()
    templated = tiny_models.make_tokenizer(chat_template="{{ messages }}")
    templated.eos_token = "<|endoftext|>"
    compare_tokenizers(facts_of_tokenizer(plain), facts_of_tokenizer(templated), "base", "kind")


def added(*tokens: str, special: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = tiny_models.make_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    else:
        tokenizer.add_tokens(list(tokens))
    return tokenizer


def masked(base: Any, other: Any, **options: Any) -> dict[int, str]:
    return compare_tokenizers(facts_of_tokenizer(base), facts_of_tokenizer(other), "base", "kind", **options)


def test_tokens_that_the_base_cannot_draw_are_no_difference_and_are_named() -> None:
    plain = tiny_models.make_tokenizer()
    assert masked(plain, plain) == {}
    assert masked(plain, added("[PAD]")) == {NUM_TINY: "[PAD]"}
    assert masked(plain, added("[PAD]", "[MASK]")) == {NUM_TINY: "[PAD]", NUM_TINY + 1: "[MASK]"}
    assert masked(plain, added("<tool>", special=False)) == {NUM_TINY: "<tool>"}
    assert masked(added("[PAD]"), plain) == {NUM_TINY: "[PAD]"}


def test_tokens_of_the_base_alone_that_answers_may_have_are_a_difference() -> None:
    plain = tiny_models.make_tokenizer()
    message = difference(added("<tool>", special=False), plain)
    assert f"({NUM_TINY + 1} and {NUM_TINY} tokens)" in message
    assert f"only base has 1 id: {NUM_TINY} ('<tool>')" in message
    with pytest.raises(ConfigurationError, match="only base has 1 id"):
        masked(added("<|im_end|>"), plain, ends={NUM_TINY})


def test_other_words_are_a_difference_wherever_they_stand() -> None:
    plain, longer = tiny_models.make_tokenizer(), tiny_models.make_tokenizer(extra=("ab",))
    assert f"only kind (small) has 1 id: {NUM_TINY} ('ab')" in difference(plain, longer)
    assert f"1 of {NUM_TINY + 1} ids differ: {NUM_TINY} ('ab' / '[PAD]')" in difference(longer, added("[PAD]"))


def test_a_swap_of_two_tokens_is_found_although_sizes_agree() -> None:
    plain = tiny_models.make_tokenizer()
    swapped = renamed(plain, {"a": "b", "b": "a"})
    vocab = plain.get_vocab()
    message = difference(plain, swapped)
    assert f"2 of {NUM_TINY} ids differ" in message
    assert f"{vocab['a']} ('a' / 'b'), {vocab['b']} ('b' / 'a')" in message


def test_of_many_differences_the_number_and_the_first_few_are_reported() -> None:
    plain = tiny_models.make_tokenizer()
    letters = "abcdefghijklmnopqrstuvwxyz"
    message = difference(plain, renamed(plain, {c: f"{c}{c}" for c in letters}))
    assert f"26 of {NUM_TINY} ids differ" in message
    assert message.count(" / ") == 5
    assert ", ..." in message


def test_padding_of_the_embedding_is_no_difference(tmp_path: Path) -> None:
    tokenizer = tiny_models.make_tokenizer()
    config = tiny_models.make_config("llama", len(tokenizer) + 27, 64)
    folder = tmp_path / "padded"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    compare_tokenizers(facts_of_tokenizer(tokenizer), read_tokenizer_facts(source_of(folder)), "base", "padded")


def test_a_loaded_tokenizer_is_the_saved_one(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(source_of(tiny("llama")))
    text = "naïve 日本 😀\n\ttabs"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    made = facts_of_tokenizer(tiny_models.make_tokenizer())
    compare_tokenizers(made, facts_of_tokenizer(tokenizer), "made", "loaded")


def test_a_model_without_a_tokenizer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    message = (
        f"^{folder} has no tokenizer, as checkpoints of a training run often .* copy tokenizer.json, tokenizer_config"
    )
    with pytest.raises(ConfigurationError, match=message):
        read_tokenizer_facts(source_of(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=f"the tokenizer of {folder} cannot be loaded"):
        read_tokenizer_facts(source_of(folder))


@pytest.mark.parametrize(("stated", "expected"), [(None, {0}), (3, {0, 3}), ([2, 4], {0, 2, 4})])
def test_every_stated_end_stops(
    stated: int | list[int] | None, expected: set[int], tiny: Tiny, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    source = source_of(folder)
    assert stop_token_ids(source, read_tokenizer_facts(source), read_model_facts(source)) == expected
    (folder / "generation_config.json").unlink()
    for name, key, end in (("config.json", "eos_token_id", stated), ("tokenizer_config.json", "eos_token", None)):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**tree, key: end}))
    assert stop_token_ids(source, read_tokenizer_facts(source), read_model_facts(source)) == expected - {0}


def test_the_context_is_what_the_configuration_states(tiny: Tiny) -> None:
    for kind in ("llama", "gpt2", "neox"):
        assert context_length(AutoConfig.from_pretrained(tiny(kind, context=64))) == 64


def test_a_configuration_without_a_context_has_none() -> None:
    assert context_length(BloomConfig()) is None
