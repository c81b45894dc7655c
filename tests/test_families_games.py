"""A game of two principals in every family of causal language models: paid as generate says, and strictly."""

from __future__ import annotations

import warnings

import pytest
from support.decoding import ask, config_of, engine_of
from support.families import generated_logprobs, make_family

from jobs.families.configurations import FAMILIES, is_installed, model_class
from pipeline.engine.engine import decode_rows

MADE = [  # the texts of composite models are families of their own
    name
    for name, family in sorted(FAMILIES.items())
    if is_installed(name) and family.why_not is None and not family.is_composite
]
PAIR = {
    "kind": {"kind": "prompted", "principle": "Be kind, and speak of the sea and of the wind.", "weight": 0.6},
    "brief": {"kind": "prompted", "principle": "Brief.", "weight": 0.3},
}
DECODING = {"max_new_tokens": 10, "trace": "tokens", "agent_temperature": 0.7, "candidates": "all"}
ROWS = [ask("a", "who?"), ask("b", "Tell me about the sea and the wind."), ask("c", "")]
TOLERANCE = 2e-3  # nats


@pytest.fixture(autouse=True)
def _quiet():
    """Configurations this small make transformers warn of sizes, and slow families say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "name", [name if at % 8 == 0 else pytest.param(name, marks=pytest.mark.nightly) for at, name in enumerate(MADE)]
)
def test_a_game_of_two_principals_pays_what_generate_says_and_no_bit_depends_on_other_rows(name, tmp_path):
    folder = make_family(tmp_path, name)
    records, assembly = _decode(folder, slots=3)
    alone, _ = _decode(folder, slots=1)
    assert records == alone
    model = model_class(name).from_pretrained(folder).eval()
    for row in ROWS:
        record = records[row.row_id]
        assert record.error is None
        answer = [token.token_id for token in record.tokens]
        prompts = assembly.prompter.encode(row.messages, record.weights)
        scores = {role: generated_logprobs(model, prompt, answer) for role, prompt in prompts.items()}
        assert [token.base_logprob for token in record.tokens] == pytest.approx(
            scores["base"].tolist(), abs=TOLERANCE
        )
        for principal in PAIR:
            reward = float((scores[principal] - scores["base"]).sum())
            assert record.rewards[principal] == pytest.approx(reward, abs=TOLERANCE * len(answer))


def _decode(folder, *, slots):
    engine, assembly = engine_of(config_of(folder, PAIR, decoding=DECODING, cluster={"slots": slots}))
    return {record.row_id: record for record in decode_rows(engine, ROWS)}, assembly
