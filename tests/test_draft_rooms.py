"""Drafts where passes have fixed shapes, as on a GPU, on a CPU: the room for them, and when they are worth it."""

from __future__ import annotations

import pytest
from support.decoding import NOWHERE, config_of
from support.language_models import load_in_slots, watching_shapes
from support.sampling_hosts import MANY_ROWS, PAIR, LoneHost
from support.unreliable import FreePace

from pipeline.engine import drafting
from pipeline.engine.guesses import Guess
from pipeline.engine.lead import Lead
from pipeline.engine.model_drafts import ModelDrafts
from pipeline.engine.pace import Pace
from pipeline.engine.scheduler import Slots
from pipeline.protocol.drafts import DraftRequest
from pipeline.protocol.messages import DRAFTED_PER_PASS, PASS_ROWS, most_drafted
from pipeline.protocol.specs import SamplingOptions
from pipeline.runtime.assembly import assemble
from pipeline.worker import start

LONG = {"max_new_tokens": 20, "agent_temperature": 0.3, "temperature": 0.0}


@pytest.fixture
def free_passes(monkeypatch):
    monkeypatch.setattr(drafting, "Pace", FreePace)
    monkeypatch.setattr(Lead, "is_worth_waiting", lambda self, *_, **__: True)
    monkeypatch.setattr(ModelDrafts, "_how_many", lambda self, ranked, *_: len(ranked))


def lone(tiny, *, captures=True, slots=4, **decoding):
    options = {**LONG, "trace": "tokens", **decoding}
    config = config_of(tiny(), PAIR, decoding=options, cluster={"slots": slots})
    return LoneHost.start(config, captures=captures, has_fixed_shapes=True)


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("slots", [1, 5, 21])
def test_records_are_those_without_drafts_and_passes_are_fewer(tiny, free_passes, captures, slots):
    """With 21 slots of three roles a pass of 64 rows is full, and drafts take the places of slots without a row."""
    rows = MANY_ROWS[: 6 if slots == 1 else 20]
    plain = lone(tiny, captures=captures, slots=slots).decode(rows, runs_ahead=captures)
    with watching_shapes() as shapes:
        host = lone(tiny, captures=captures, slots=slots, draft=["lookup"])
        shapes.clear()
        drafted = host.decode(rows, runs_ahead=captures)
    assert drafted == plain
    assert sum(record.num_tokens - record.num_passes for record in drafted.values()) > 5
    assert {shape[-1] for shape in shapes} <= {PASS_ROWS, 256, 1}


def test_a_model_proposes_from_passes_of_fixed_shapes(tiny, free_passes, monkeypatch):
    alike = {"agent_temperature": 50.0, "temperature": 1.0}
    plain = lone(tiny, **alike).decode(MANY_ROWS[:6])
    monkeypatch.setattr(start, "_load", lambda spec: start.LoadedModel(load_in_slots(spec, has_fixed_shapes=True)))
    host = lone(tiny, draft=["model"], draft_model=str(tiny()), **alike)
    drafted = host.decode(MANY_ROWS[:6])
    assert drafted == plain
    num_passes = sum(each.num_passes for each in drafted.values())
    assert sum(each.num_tokens for each in drafted.values()) > 3 * num_passes  # it is the base itself


def test_what_a_model_reads_as_rows_is_what_it_reads_as_a_prompt(tiny, monkeypatch):
    monkeypatch.setattr(start, "_load", lambda spec: start.LoadedModel(load_in_slots(spec, has_fixed_shapes=True)))
    decoding = {"draft": ["model"], "draft_model": str(tiny(seed=2))}
    spec = assemble(config_of(tiny(), PAIR, cluster={"slots": 3}, decoding=decoding), NOWHERE).draft
    model = start.start_drafting(spec, SamplingOptions(num_candidates=20))
    prompts = []
    run_prompts = model._passes._captured_passes.run_prompts
    monkeypatch.setattr(
        model._passes._captured_passes, "run_prompts", lambda part: prompts.append(part) or run_prompts(part)
    )
    text = [*range(40, 70)]
    for length, num_passes in ((12, 1), (13, 1), (17, 1), (30, 2)):
        requests = [DraftRequest(slot, [5 + slot, *text[:length]], 0.4, (0.9, 0.9)) for slot in range(3)]
        found = model.propose(requests)
        assert len(prompts) == num_passes  # 13 tokens are too many to read as rows
        held = list(model._held)
        model.forget()
        with monkeypatch.context() as patch:
            patch.setattr(model._passes._captured_passes, "run_prompts", run_prompts)
            anew = model.propose(requests)
        assert model._held == held
        assert [each.token for each in found] == [each.token for each in anew]
        assert [each.probability for each in found] == pytest.approx([each.probability for each in anew], abs=1e-4)


@pytest.mark.parametrize(
    ("num_slots", "num_roles", "room"),
    [(1, 3, 8), (4, 3, 17), (16, 3, 5), (20, 3, 1), (21, 3, 0), (32, 3, 10), (32, 1, 32), (32, 2, 0), (64, 3, 0)],
)
def test_a_full_batch_leaves_the_room_that_rounds_its_pass_up(num_slots, num_roles, room):
    assert most_drafted(num_slots, num_roles) == room
    rows = num_roles * (num_slots + room)
    assert rows <= -(-num_slots * num_roles // PASS_ROWS) * PASS_ROWS
    assert most_drafted(num_slots) == min(8 * num_slots, DRAFTED_PER_PASS)


def test_slots_without_a_row_are_lanes_where_passes_hold_them_anyway():
    slots = Slots(32, 1, keeps_tokens=False, rows_of_slots=[3, 0])
    group = slots.next_group()
    assert len(group.open_lanes) == DRAFTED_PER_PASS
    del group.free[2:]
    assert list(group.open_lanes) == [*range(32, 42), 0, 1]
    group.guesses = {5: Guess("lookup", [7] * 6, [1.0] * 6), 9: Guess("lookup", [8] * 6, [1.0] * 6)}
    assert [each for draft in group.drafts for each in draft.lanes] == [*range(32, 42), 0, 1]
    slots.halve()
    assert list(slots.next_group().lanes) == [*range(16, 21)]
    elsewhere = Slots(32, 1, keeps_tokens=False).next_group()
    assert list(elsewhere.open_lanes) == [*range(32, 64)]


def test_positions_within_the_room_are_free_until_passes_show_otherwise():
    pace = Pace(is_free=True)
    assert not pace.is_worth(0.9, 16, 16)  # no pass was seen
    for _ in range(6):
        pace.note(16, 0.007)
    assert not pace.begins_probe()
    assert pace.is_worth(0.01, 16, 16)
    pace.note(24, 0.0075)  # noise
    assert pace.is_worth(0.3, 16, 24)
    for num_positions in [16, 32, 24] * 20:
        pace.note(num_positions, 0.001 + 0.0004 * num_positions)  # long rows to attend over
    assert pace.is_worth(0.99, 16, 16)
    assert not pace.is_worth(0.5, 16, 16)


def test_what_is_sent_ahead_is_given_up_for_drafts_that_are_worth_the_wait():
    lead, pace = Lead(), Pace(is_free=True)
    assert not lead.is_worth_waiting(80, 80, 16, pace)  # nothing was sent ahead
    for _ in range(5):
        pace.note(16, 0.007)
        lead.note_gap(0.002)
        lead.note_ahead(16, 0.007)
    lead.note_gap(10.0)  # a file was written
    assert lead.gap_s == pytest.approx(0.002)
    assert lead.wait_s(16, pace) == pytest.approx(0.002)
    assert not lead.is_worth_waiting(18.0, 20, 16, pace)
    assert lead.is_worth_waiting(22.0, 24, 16, pace)
    assert not lead.is_worth_waiting(1.2, 2, 1, pace)
    assert lead.is_worth_waiting(1.9, 2, 1, pace)
