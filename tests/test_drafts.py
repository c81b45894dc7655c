"""Drafts: passes that verify proposed tokens give the same records as passes of one token."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.decoding import ask, config_of, engine_of
from support.lora import make_lora
from support.sampling_hosts import MANY_ROWS, PAIR
from support.unreliable import FailsOrForgets, FreePace, LacksMemoryForDrafts, Replica, nothing

from pipeline.engine import drafting
from pipeline.engine.engine import decode_rows
from pipeline.protocol import messages
from pipeline.worker import language_model_runner

EXISTING = {"input": {"path": "x", "response": "r"}}
GREEDY = {"temperature": 0.0, "agent_temperature": 3.0}  # leaves the base's answers here and there


@pytest.fixture(autouse=True)
def free_passes(monkeypatch):
    monkeypatch.setattr(drafting, "Pace", FreePace)


def decoded(config, rows):
    """Records by answer, and the tallies by source."""
    engine, assembly = engine_of(config)
    found = decode_rows(engine, rows, num_variants=len(assembly.variants), num_samples=config.decoding.n)
    records = {(each.row_id, each.variant, each.sample): each for each in found}
    return records, {} if engine.drafter is None else engine.drafter.tallies


def compared(base, rows, draft, *, principals=PAIR, slots=5, **sections):
    """Check that records are the same with and without drafts; return the last ones, and the source's tally."""
    decoding = {"max_new_tokens": 16, "trace": "tokens", "agent_temperature": 0.3, **sections.pop("decoding", {})}

    def config(num_slots, source):
        of_decoding = {**decoding, "draft": source}
        return config_of(base, principals, decoding=of_decoding, cluster={"slots": num_slots}, **sections)

    plain, _ = decoded(config(8, "off"), rows)
    assert all(record.num_passes == record.num_tokens for record in plain.values())
    records, tallies = decoded(config(slots, [draft]), rows)
    assert records == plain
    tally = tallies[draft]
    assert tally.accepted == sum(record.num_tokens - record.num_passes for record in records.values())
    assert tally.drafted > tally.accepted
    return records, tally


def answers_as_input(base, rows):
    """The rows with what the base alone answers; the text of a random model may be read as other tokens."""
    own = {"max_new_tokens": 16, "temperature": 0.0, "draft": "off"}
    records, _ = decoded(config_of(base, decoding=own, cluster={"slots": 8}), rows)
    return [replace(row, response=records[row.row_id, 0, 0].response) for row in rows]


@pytest.mark.parametrize("slots", [1, 5])
def test_what_a_row_says_again(tiny, slots):
    _, tally = compared(tiny(), MANY_ROWS[:8], "lookup", slots=slots, decoding={"temperature": 0.0})
    assert tally.accepted > 5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_existing_answers(tiny, kind):
    """mistral has a window that is shorter than its rows."""
    rows = answers_as_input(tiny(kind), MANY_ROWS[:6])
    _, tally = compared(tiny(kind), rows, "response", decoding=GREEDY, **EXISTING)
    assert tally.accepted > 10


def test_siblings_by_other_rules_and_weights(tiny):
    grid = {"rules": ["equilibrium", "linear"], "weights": [{"kind": 1, "brief": 0}, {"kind": 0.5, "brief": 0.5}]}
    _, tally = compared(tiny(), MANY_ROWS[:2], "siblings", slots=1, grid=grid, decoding={"top_p": 0.9})
    assert tally.accepted > 10


def test_samples_over_the_whole_vocabulary(tiny):
    decoding = {"n": 3, "temperature": 0.3, "candidates": "all"}
    _, tally = compared(tiny(), MANY_ROWS[:3], "siblings", decoding=decoding)
    assert tally.accepted > 2


def test_a_pass_may_have_parts_of_a_prompt_alone(tiny, monkeypatch):
    """A relaxed pass is not padded: while the first part of a long prompt is read, no row draws a token."""
    decoding = {"max_new_tokens": 4, "reproducibility": "relaxed", "draft": ["lookup"]}
    engine, _ = engine_of(config_of(tiny(), decoding=decoding, cluster={"slots": 2}))
    for module in (messages, language_model_runner):  # a few words are a long prompt
        monkeypatch.setattr(module, "CHUNK", 16)
    [record] = decode_rows(engine, [ask("long", "again and " * 8)])
    assert (record.error, record.num_tokens) == (None, 4)


def test_adapters_and_the_prefixes_that_rows_share(tiny, tmp_path):
    make_lora(tmp_path / "a", tiny(), "q_proj", "v_proj", "down_proj", seed=3)
    principals = {"adapted": {"kind": "arm", "adapter": str(tmp_path / "a"), "weight": 0.5}}
    rows = answers_as_input(tiny(), [ask(f"r{at}", f"one beginning for all of them {at}") for at in range(5)])
    _, tally = compared(tiny(), rows, "response", principals=principals, decoding=GREEDY, **EXISTING)
    assert tally.accepted > 5


def test_an_answer_ends_where_it_would(tiny):
    """At a stop string or at its own limit in the middle of a draft, and nothing behind counts."""
    rows = answers_as_input(tiny(), MANY_ROWS[:6])
    ends = [
        replace(row, max_new_tokens=at, stop=(row.response[3:5],) if at % 2 else None)
        for at, row in enumerate(rows, 5)
    ]
    records, tally = compared(tiny(), ends, "response", decoding=GREEDY, **EXISTING)
    assert tally.accepted > 5
    lengths = [records[row.row_id, 0, 0].num_tokens for row in ends]
    assert any(length < row.max_new_tokens for length, row in zip(lengths, ends, strict=True))
    assert any(length == row.max_new_tokens for length, row in zip(lengths, ends, strict=True))


@pytest.mark.parametrize("way", [{"num_groups": 2}, {"runs_ahead": True}])
def test_hosts_that_fail_or_forget_change_nothing(tiny, way):
    options = {"max_new_tokens": 8, "slots": 4}
    reference, _ = Replica(tiny, **way, **options).decode(nothing)
    replica = Replica(tiny, **way, **options, drafts=True)
    records, engine = replica.decode(nothing)
    assert records == reference
    num_accepted = []
    for moment in range(2, engine.calls.hosts.base.calls + 1, 7):
        records, engine = replica.decode(FailsOrForgets(moment))
        assert records == reference
        num_accepted.append(sum(tally.accepted for tally in engine.drafter.tallies.values()))
    assert max(num_accepted) > 2  # what a row had drawn before is proposed again


def test_out_of_memory_halves_the_rows_and_changes_nothing(tiny):
    options = {"max_new_tokens": 8, "slots": 4}
    reference, _ = Replica(tiny, **options).decode(nothing)
    lacks = LacksMemoryForDrafts()
    records, engine = Replica(tiny, **options, drafts=True).decode(lacks)
    assert lacks.is_over
    assert engine.num_slots == 2
    assert records == reference
