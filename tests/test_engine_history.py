"""A row's answer does not depend on what the same engine decoded before: what slots still hold is a short cut."""

from __future__ import annotations

import random

import pytest
from support.decoding import ask, config_of, engine_of

from pipeline.engine.engine import decode_rows

PROMPTED = {
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.7},
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.4},
}
TEXTS = ["hello", "hello", "what is ice made of?", "x", "hello there"]


def answers(engine, rows):
    return {record.row_id: (record.response, record.rewards) for record in decode_rows(engine, rows)}


@pytest.mark.parametrize("reproducibility", ["strict", "relaxed"])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_answers_do_not_depend_on_what_was_decoded_before(tiny, slots, reproducibility):
    decoding = {"max_new_tokens": 6, "agent_temperature": 0.5, "reproducibility": reproducibility}
    config = config_of(tiny(), PROMPTED, decoding=decoding, cluster={"slots": slots})
    rows = [ask(f"r{at}", text) for at, text in enumerate(TEXTS)]
    expected = {}
    for row in rows:
        engine, _ = engine_of(config)
        expected |= answers(engine, [row])
    used, _ = engine_of(config)
    chance = random.Random(slots)
    for _ in range(12):
        chosen = chance.sample(rows, chance.randint(1, len(rows)))
        found = answers(used, chosen)
        assert {name: text for name, (text, _) in found.items()} == {
            row.row_id: expected[row.row_id][0] for row in chosen
        }
        if reproducibility == "strict":
            assert found == {row.row_id: expected[row.row_id] for row in chosen}


def test_a_prompt_that_a_slot_holds_whole_is_copied_to_another_slot(tiny):
    """In a step that computes no other prompt: the copies were left out there, and the second row read nothing."""
    config = config_of(
        tiny(), PROMPTED, decoding={"max_new_tokens": 6, "agent_temperature": 0.5}, cluster={"slots": 4}
    )
    first, second = ask("a", "hello"), ask("b", "hello")
    fresh, _ = engine_of(config)
    expected = answers(fresh, [second])
    engine, _ = engine_of(config)
    answers(engine, [ask("0", "hello"), ask("1", "what is ice made of?"), ask("2", "x")])
    assert answers(engine, [first, second])["b"] == expected["b"]


@pytest.mark.parametrize("pairs", [False, True])
def test_reward_models_do_not_depend_on_it_either(tiny, judge, pairs):
    principals = {"judge": {"kind": "reward_model", "model": str(judge(pairs=pairs)), "candidates": 4}}
    config = config_of(tiny(), principals, decoding={"max_new_tokens": 5}, cluster={"slots": 3})
    rows = [ask(f"r{at}", text) for at, text in enumerate(TEXTS)]
    expected = {}
    for row in rows:
        engine, _ = engine_of(config)
        expected |= answers(engine, [row])
    used, _ = engine_of(config)
    for chosen in (rows[:3], rows[1:], rows[:2], rows[::-1]):
        assert answers(used, chosen) == {row.row_id: expected[row.row_id] for row in chosen}
