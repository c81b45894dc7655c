"""The agent temperature that follows a target for KL, and the options of rules that pay without a game."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from cage.rule_names import RuleName
from pipeline import Aligner
from pipeline.engine.row_state import RunningRow
from pipeline.errors import ConfigurationError
from pipeline.protocol.messages import Terms, TokenOutcome
from pipeline.records import Row
from pipeline.sampling.draws import Uniforms
from pipeline.sampling.kl_control import FARTHEST, GAIN, steered_to

TERMS = Terms(RuleName.LINEAR, 0.5, (1.0,))
PRINCIPALS = {
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.7},
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.4},
}
PROMPTS = ["hello", "what is ice made of?", "x", "tell me a story"]


def temperature_after(*spent: float, target: float = 0.2) -> float:
    return steered_to(TERMS, target, spent).agent_temperature


def test_a_row_begins_at_the_configured_temperature_and_keeps_it_on_target():
    assert temperature_after() == temperature_after(0.2) == temperature_after(0.1, 0.3) == 0.5


def test_a_row_ahead_of_its_target_is_steered_less_and_one_behind_more():
    assert temperature_after(0.4) == pytest.approx(0.5 * math.exp(GAIN))
    assert temperature_after(0.0, 0.0) == pytest.approx(0.5 * math.exp(-2 * GAIN))


def test_the_temperature_stays_within_its_bounds():
    assert temperature_after(1e9) == pytest.approx(0.5 * math.exp(GAIN * FARTHEST))
    assert temperature_after(*[0.0] * 1000) == pytest.approx(0.5 * math.exp(-GAIN * FARTHEST))


def answers(tiny, *, slots, **decoding):
    options = {"max_new_tokens": 40, "agent_temperature": 1.0, "candidates": 20, "trace": "tokens", **decoding}
    with Aligner(str(tiny("llama")), PRINCIPALS, slots=slots, **options) as aligner:
        return aligner.generate(PROMPTS)


@pytest.mark.parametrize("rule", ["linear", "soft_threshold"])
def test_answers_come_near_their_target_and_no_bit_depends_on_the_slots(tiny, rule):
    free = answers(tiny, slots=4, rule=rule)
    target = 0.5 * sum(each.kl_per_token for each in free) / len(free)
    steered = answers(tiny, slots=4, rule=rule, target_kl=target)
    assert steered == answers(tiny, slots=1, rule=rule, target_kl=target)
    long = [each for each in steered if each.num_tokens >= 30]
    assert long
    assert all(abs(each.kl_per_token - target) < 0.25 * target for each in long)


def test_each_principal_can_have_its_own_threshold(tiny):
    """One that never pays is worth nothing: the other alone decides."""
    never = {"brief": 1e6, "kind": 0.0}
    both = answers(tiny, slots=2, rule="soft_threshold", soft_threshold=never)
    assert all(each.payments["brief"] == 0 for each in both)
    assert any(each.payments["kind"] > 0 for each in both)
    alone = {**PRINCIPALS, "brief": {**PRINCIPALS["brief"], "weight": 0.0}}
    options = {"max_new_tokens": 40, "agent_temperature": 1.0, "candidates": 20, "rule": "soft_threshold"}
    with Aligner(str(tiny("llama")), alone, slots=2, soft_threshold=0.0, **options) as aligner:
        assert [each.text for each in aligner.generate(PROMPTS)] == [each.text for each in both]


@pytest.mark.parametrize(
    ("decoding", "said"),
    [
        (
            {"soft_threshold": {"brief": 1.0}},
            r"soft_threshold must name every principal once \(brief, kind\); got brief",
        ),
        ({"soft_threshold": float("nan")}, "soft_threshold"),
        ({"target_kl": 0}, "target_kl"),
        ({"target_kl": -1.0}, "target_kl"),
        ({"soft_threshold": 2.0}, "no effect without rule: soft_threshold"),
        ({"soft_threshold": {"brief": 1.0, "kind": 2.0}}, "no effect without rule: soft_threshold"),
        ({"target_kl": 0.2, "rule": "base"}, "no effect where no principal steers"),
        ({"target_kl": 0.2, "unit": "answer"}, "no effect with unit: answer, which is one game"),
    ],
)
def test_options_that_mean_nothing_are_refused(tiny, decoding, said):
    with pytest.raises(ConfigurationError, match=said):
        Aligner(str(tiny("llama")), PRINCIPALS, **decoding)


def test_a_token_that_closes_reasoning_spends_nothing():
    """No policy drew it: what the drawn token's policy would have spent is not counted."""
    outcome = TokenOutcome(3, [0.1], None, None, -1.0, -0.5, 0.7, 1.0, 0.0, 0, 1)
    track = SimpleNamespace(is_steered=True, forced_token=lambda: next(forced), advance=lambda tokens: None)
    forced = iter([None, 9, None])
    row = RunningRow(Row("r", ()), 0, 0, ("brief",), TERMS, Uniforms(0, "r", 0), target_kl=0.2, reasoning=track)
    for _ in range(3):
        row.append(outcome)
    assert row.tokens == [3, 9, 3]
    assert row.spent_kl == [0.7, 0.7]
