"""What is found out about chat templates by rendering them: system messages, ends of turns, values, the time."""

from __future__ import annotations

from datetime import datetime

import pytest
from support import tiny_models
from support.chat_templates import CHATML, FAMILIES, GPT_OSS, LLAMA32, NAMED, QWEN3, SPECIAL

from pipeline.errors import ConfigurationError
from pipeline.hub.chat_templates import end_of_turn, pin_clock, reads_clock, render, system_messages, variables_of

SYSTEM = {"role": "system", "content": " Be kind. "}
TURNS = [
    {"role": "user", "content": " hello <|im_end|>"},
    {"role": "assistant", "content": "<think>hm</think>\nhi\n"},
    {"role": "user", "content": "täglich 日本"},
]
NOW = datetime(2026, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("asks", [True, False])
def test_templates_are_rendered_as_transformers_renders_them(family: str, asks: bool) -> None:
    template, does_with_system, _ = FAMILIES[family]
    template = pin_clock(template, NOW)
    tokenizer = tiny_models.make_tokenizer(extra=("<s>", "</s>"))
    tokenizer.add_special_tokens(NAMED)
    named = {**NAMED, "pad_token": tiny_models.EOS}
    for messages in (TURNS, TURNS[:1], TURNS[:2], [SYSTEM, *TURNS]):
        if does_with_system == "refused" and messages[0] is SYSTEM:
            continue
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=asks, principle=""
        )
        assert render(template, messages, named, asks=asks) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_template_does_with_a_system_message_is_found_by_rendering(family: str) -> None:
    template, expected, _ = FAMILIES[family]
    assert system_messages(template, NAMED) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_the_special_token_after_an_answer(family: str) -> None:
    template, _, expected = FAMILIES[family]
    special = {token: index for index, token in enumerate(SPECIAL)}
    assert end_of_turn(template, NAMED, special) == special.get(expected)


def test_a_template_that_fails_on_every_conversation_is_not_judged() -> None:
    assert system_messages("{{ raise_exception('no') }}", {}) == "written"
    assert end_of_turn("{{ raise_exception('no') }}", {}, {"</s>": 1}) is None


def test_a_template_that_writes_a_system_message_in_the_first_turn_only_leaves_it_out() -> None:
    first_only = "{% for m in messages %}{% if m.role != 'system' or messages|length < 3 %}{{ m.content }}{% endif %}"
    assert system_messages(first_only + "{% endfor %}", {}) == "left out"


def test_the_time_is_written_into_a_template() -> None:
    assert reads_clock(LLAMA32)
    assert reads_clock(GPT_OSS)
    assert not reads_clock(CHATML)
    assert "Today Date: 03 Feb 2026\n" in render(pin_clock(LLAMA32, NOW), TURNS, NAMED)
    assert "Current date: 2026-02-03\n" in render(pin_clock(GPT_OSS, NOW), TURNS, NAMED)
    assert pin_clock(CHATML, NOW) == CHATML
    given = render(pin_clock(LLAMA32, NOW), TURNS, {**NAMED, "date_string": "1 May 1999"})
    assert "Today Date: 1 May 1999\n" in given


@pytest.mark.parametrize("call", ["strftime_now('%d' + '%m')", "strftime_now(form)", "strftime_now ( form )"])
def test_a_computed_time_cannot_be_kept_and_is_refused(call: str) -> None:
    with pytest.raises(ConfigurationError, match="computes the format of strftime_now"):
        pin_clock("{{ " + call + " }}", NOW)


def test_the_values_that_a_template_reads_are_known() -> None:
    assert variables_of(QWEN3) >= {"messages", "add_generation_prompt", "enable_thinking"}
    assert "enable_thinking" not in variables_of(CHATML)
    assert "date_string" in variables_of(LLAMA32)
    with pytest.raises(ConfigurationError, match="not valid Jinja: line 1"):
        variables_of("{% for %}")
