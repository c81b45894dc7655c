"""The source `model`: a small model proposes what it would draw itself, and nothing of that changes a record."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of, engine_of
from support.draft_models import perturbed, shared_probability
from support.families import make_family
from support.lora import make_lora
from support.runs import PRINCIPALS, job, parts, run_job, write_prompts
from support.sampling_hosts import MANY_ROWS, PAIR
from support.tiny_models import make_model, make_pair_tokenizer, make_tokenizer
from support.unreliable import FailsOrForgets, FreePace, LacksMemoryForDrafts, Replica, nothing
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from jobs.commands.plan import describe_plan
from pipeline.config.drafts import DraftSource
from pipeline.engine import drafting
from pipeline.engine.engine import decode_rows
from pipeline.engine.guesses import Rates
from pipeline.engine.model_drafts import TRIED, Asked, ModelDrafts
from pipeline.engine.pace import Pace
from pipeline.errors import ConfigurationError
from pipeline.protocol.drafts import DraftRequest, Proposed
from pipeline.protocol.specs import SamplingOptions
from pipeline.runtime import engines
from pipeline.runtime.assembly import assemble
from pipeline.runtime.replica_plan import plan_replica
from pipeline.stages.relabel import prepare
from pipeline.worker import draft_model
from pipeline.worker.start import start_drafting

ALIKE = {"temperature": 1.0, "agent_temperature": 50.0}  # so that the game is the base's
GREEDY = {"temperature": 0.0, "agent_temperature": 3.0}


@pytest.fixture
def free_passes(monkeypatch):
    monkeypatch.setattr(drafting, "Pace", FreePace)
    monkeypatch.setattr(ModelDrafts, "_how_many", lambda self, ranked, *_: len(ranked))


@pytest.fixture(scope="module")
def sketch(tiny, tmp_path_factory):
    """A copy of a tiny model that shares 0.7 of its probability."""

    def make(kind="llama"):
        folder = tmp_path_factory.mktemp("sketch") / kind
        return perturbed(folder, tiny(kind))

    return make


def decoded(config, rows):
    """Records by answer, and the tally of the model."""
    engine, assembly = engine_of(config)
    found = decode_rows(engine, rows, num_variants=len(assembly.variants), num_samples=config.decoding.n)
    records = {(each.row_id, each.variant, each.sample): each for each in found}
    return records, None if engine.drafter is None else engine.drafter.tallies.get(DraftSource.MODEL)


def compared(base, rows, model, *, principals=PAIR, slots=5, draft=("model",), **sections):
    """Check that records are the same with the model and without; tokens for each pass, and the tally."""
    decoding = {"max_new_tokens": 16, "trace": "tokens", **sections.pop("decoding", {})}

    def config(num_slots, **of_draft):
        tree = {**decoding, **of_draft}
        return config_of(base, principals, decoding=tree, cluster={"slots": num_slots}, **sections)

    plain, _ = decoded(config(8, draft="off"), rows)
    records, tally = decoded(config(slots, draft=list(draft), draft_model=model), rows)
    assert records == plain
    assert tally.accepted <= sum(record.num_tokens - record.num_passes for record in records.values())
    assert tally.drafted >= tally.accepted
    totals = [sum(getattr(each, name) for each in records.values()) for name in ("num_tokens", "num_passes")]
    return totals[0] / totals[1], tally


@pytest.mark.parametrize("draws", [{"temperature": 0.0}, {}, {"temperature": 0.7, "top_p": 0.8}, {"min_p": 0.05}])
@pytest.mark.parametrize("candidates", [20, "all"])
def test_the_base_itself_draws_what_it_draws(tiny, free_passes, draws, candidates):
    """The same draws in the same order of candidates: nothing that it proposes is wrong but for rounding."""
    decoding = {"rule": "base", "candidates": candidates, **draws}
    _, tally = compared(tiny(), MANY_ROWS[:6], str(tiny()), decoding=decoding)
    assert tally.drafted > 30
    assert tally.accepted >= tally.drafted - 1


@pytest.mark.parametrize("decoding", [ALIKE, {**ALIKE, "temperature": 0.0}])
def test_a_model_that_shares_most_of_the_probability_gives_two_tokens_a_pass(tiny, sketch, free_passes, decoding):
    folder = sketch()
    assert shared_probability(tiny(), folder) == pytest.approx(0.7, abs=0.05)
    rows = [ask(f"r{at}", "tell me " * (at % 5) + "x" * at) for at in range(10)]
    tokens_per_pass, tally = compared(tiny(), rows, str(folder), slots=3, decoding={"max_new_tokens": 40, **decoding})
    assert tokens_per_pass >= 2
    assert tally.accepted < tally.drafted


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "qwen3"])
def test_other_families_and_several_hosts(tiny, sketch, free_passes, kind):
    """mistral has a window that is shorter than its rows."""
    arm = {"kind": "arm", "model": str(tiny(kind, seed=5)), "reference": "none", "weight": 0.1}
    _, tally = compared(
        tiny(kind), MANY_ROWS[:6], str(sketch(kind)), principals={**PAIR, "arm": arm}, decoding=GREEDY
    )
    assert tally.accepted > 5


def test_the_first_layers_of_the_base(tiny, free_passes):
    _, tally = compared(tiny(), MANY_ROWS[:6], {"layers": 1}, decoding=ALIKE)
    assert tally.accepted > 1


def test_the_layers_of_a_model_are_its_first_ones(tiny, capfd):
    """They draw what transformers draws from the hidden state behind them, by the model's own norm and head."""
    config = config_of(tiny(), PAIR, decoding={"draft": ["model"], "draft_model": {"layers": 1}})
    model = start_drafting(assemble(config, NOWHERE).draft, SamplingOptions(temperature=0.0))
    assert "UNEXPECTED" not in capfd.readouterr().err  # the other layers are left out on purpose
    whole = AutoModelForCausalLM.from_pretrained(tiny())
    for seed in range(6):
        text = torch.randint(5, 200, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
        with torch.no_grad():
            states = whole.model(torch.tensor([text]), output_hidden_states=True).hidden_states[1]
            expected = int(whole.lm_head(whole.model.norm(states))[0, -1, :261].argmax())
        [proposed] = model.propose([DraftRequest(0, text, 0.0, (0.0, 1.0))])
        assert proposed.token == expected


def test_grids_adapters_and_every_other_source_beside_it(tiny, sketch, free_passes, tmp_path):
    make_lora(tmp_path / "a", tiny(), "q_proj", "v_proj", "down_proj", seed=3)
    principals = {"adapted": {"kind": "arm", "adapter": str(tmp_path / "a"), "weight": 0.5}}
    grid = {"rules": ["equilibrium", "linear"], "draw_temperatures": [0.5, 1.0]}
    rows = [replace(each, response="fine, then") for each in MANY_ROWS[:3]]
    every = ("response", "siblings", "lookup", "model")
    sections = {"grid": grid, "input": {"path": "x", "response": "r"}, "decoding": {"agent_temperature": 20.0}}
    per_pass, tally = compared(tiny(), rows, str(sketch()), principals=principals, draft=every, **sections)
    assert tally.accepted > 5
    assert per_pass > 1.5


def test_answers_end_where_they_would(tiny, sketch, free_passes):
    """At a stop string or at their own limit behind proposals, and nothing behind counts."""
    plain, _ = decoded(config_of(tiny(), PAIR, decoding={"max_new_tokens": 16, **ALIKE}), MANY_ROWS[:6])
    rows = [
        replace(row, max_new_tokens=at, stop=(plain[row.row_id, 0, 0].response[3:5],) if at % 2 else None)
        for at, row in enumerate(MANY_ROWS[:6], 5)
    ]
    _, tally = compared(tiny(), rows, str(sketch()), decoding=ALIKE)
    assert tally.accepted > 5


def test_texts_beyond_the_context_of_the_model_are_not_drafted(tiny, free_passes):
    """It reads positions of its own: behind the last one there is nothing to read."""
    num_drafted = []
    for num_words in (1, 6, 12):
        rows = [ask("r", "again and " * num_words)]
        _, tally = compared(
            tiny("gpt2"), rows, str(tiny("gpt2", context=96)), decoding={"max_new_tokens": 40, **ALIKE}
        )
        num_drafted.append(tally.drafted)
    assert num_drafted[0] > num_drafted[1] > num_drafted[2] == 0


@pytest.mark.parametrize("way", [{"num_groups": 2}, {"runs_ahead": True}, {"reproducibility": "relaxed"}])
def test_hosts_that_fail_or_forget_change_nothing(tiny, sketch, free_passes, way):
    options = {"max_new_tokens": 8, "slots": 4, **way}
    if way.get("reproducibility") == "relaxed":  # kept tokens are read again, and its bits may differ by that
        options["slots"] = 1
    reference, _ = Replica(tiny, **options).decode(nothing)
    replica = Replica(tiny, **options, drafts=True, draft_model=sketch())
    records, engine = replica.decode(nothing)
    assert {key: each.response for key, each in records.items()} == {k: r.response for k, r in reference.items()}
    for moment in range(2, engine.calls.hosts.base.calls + 1, 7):
        records, engine = replica.decode(FailsOrForgets(moment))
        if "reproducibility" not in way:
            assert records == reference
        assert {key: each.response for key, each in records.items()} == {k: r.response for k, r in reference.items()}
    assert engine.drafter.tallies[DraftSource.MODEL].accepted > 2


def test_out_of_memory_halves_the_rows_and_changes_nothing(tiny, sketch, free_passes):
    options = {"max_new_tokens": 8, "slots": 4}
    reference, _ = Replica(tiny, **options).decode(nothing)
    lacks = LacksMemoryForDrafts()
    replica = Replica(tiny, **options, drafts=True, draft_model=sketch())
    records, engine = replica.decode(lacks)
    assert lacks.is_over
    assert engine.num_slots == 2
    assert records == reference
    assert len(replica.draft_model._held) == 2


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("out of memory"), "out of memory"),
        (IndexError("index 9 is out of range"), "index 9 is out of range"),
    ],
)
def test_a_model_that_fails_proposes_nothing_more_and_says_so(tiny, sketch, free_passes, monkeypatch, error, says):
    calls = []
    config = config_of(
        tiny(), PAIR, decoding={"max_new_tokens": 12, "draft": ["model"], "draft_model": str(sketch())}
    )
    plain, _ = decoded(config_of(tiny(), PAIR, decoding={"max_new_tokens": 12}), MANY_ROWS[:4])
    engine, _ = engine_of(config)
    passes = engine.drafter._model.model._passes
    run = passes.run

    def lacks(batch, newest):
        calls.append(batch)
        if len(calls) > 9:
            raise error
        return run(batch, newest)

    prepared, guess, texts = [], engine.drafter._model.guess, engine.drafter._texts

    def noted(rows, **options):
        prepared.append(len(calls))
        assert all(each.text is texts.read(each.running).text for each in rows)  # not a copy of it
        return guess(rows, **options)

    monkeypatch.setattr(engine.drafter._model, "guess", noted)
    monkeypatch.setattr(passes, "run", lacks)
    with pytest.warns(RuntimeWarning, match=f"the model that proposes tokens: {says}; it proposes nothing"):
        records = {(each.row_id, 0, 0): each for each in decode_rows(engine, MANY_ROWS[:4])}
    assert len(calls) == 10
    assert prepared[-1] < 10  # no row is prepared for a model that is given up
    assert {key: each.response for key, each in records.items()} == {k: r.response for k, r in plain.items()}


def test_what_is_kept_of_earlier_texts_changes_no_proposal(tiny, monkeypatch):
    """Rows go on, go back, begin again in any slot and share prefixes: proposals are those of a model that knows
    nothing."""
    monkeypatch.setattr(draft_model, "CHUNK", 16)
    monkeypatch.setattr(draft_model, "WORTH_COPYING", 4)
    config = config_of(
        tiny(), PAIR, cluster={"slots": 3}, decoding={"draft": ["model"], "draft_model": str(tiny(seed=2))}
    )
    spec = assemble(config, NOWHERE).draft
    options = SamplingOptions(num_candidates=20)
    model = start_drafting(spec, options)
    choose = torch.Generator().manual_seed(0)

    def number(below):
        return int(torch.randint(below, (1,), generator=choose))

    texts = [[5 + number(200) for _ in range(8 + number(60))] for _ in range(3)]
    texts.append([*texts[0][:20], 7, 8, 9])
    slots = [[9], [9], [9]]
    for _ in range(40):
        for at in range(3):
            kind = number(5)
            if kind == 0:
                slots[at] = list(texts[number(4)])
            elif kind == 1:
                slots[at] = [*slots[at][: max(1, len(slots[at]) - number(6))], 5 + number(200)]
            else:
                slots[at] = [*slots[at], 5 + number(200)]
        asked = [at for at in range(3) if number(4)]
        requests = [DraftRequest(at, slots[at], number(1000) / 1000, (0.8, 0.95)) for at in asked]
        if not requests:
            continue
        found = model.propose(requests)
        fresh = []
        for each in requests:
            model_state = model._held
            model._held = [()] * 3
            fresh += model.propose([each])
            model._held[each.slot] = tuple(each.text)
            for other in range(3):
                if other != each.slot:
                    model._held[other] = model_state[other]
        assert [each.token for each in found] == [each.token for each in fresh]
        assert [each.probability for each in found] == pytest.approx([each.probability for each in fresh], abs=1e-4)


def test_rows_that_are_new_together_are_read_in_passes_of_bounded_size(tiny, monkeypatch):
    monkeypatch.setattr(draft_model, "CHUNK", 16)
    monkeypatch.setattr(draft_model, "PROMPT_TOKENS_PER_STEP", 40)
    config = config_of(
        tiny(), PAIR, cluster={"slots": 6}, decoding={"draft": ["model"], "draft_model": str(tiny(seed=2))}
    )
    model = start_drafting(assemble(config, NOWHERE).draft, SamplingOptions(num_candidates=20))
    run, read = model._passes.run, []

    def noted(batch, newest):
        read.append(len(batch.tokens))
        return run(batch, newest)

    monkeypatch.setattr(model._passes, "run", noted)
    requests = [DraftRequest(at, [5 + at, *range(40, 55)], 0.3, (0.8, 0.95)) for at in range(6)]
    together = model.propose(requests)
    assert 16 < max(read) <= 40
    model.resize(6)
    alone = [model.propose([each])[0] for each in requests]
    assert [each.token for each in together] == [each.token for each in alone]


def test_slots_leave_memory_for_the_model(tiny, monkeypatch):
    budgets = []

    def fits(found):
        budgets.extend(found)
        return 7

    monkeypatch.setattr(engines, "slots_that_fit", fits)
    options = {"cluster": {"slots": "auto"}, "decoding": {"draft": ["model"], "draft_model": str(tiny(seed=2))}}
    engine, _ = engine_of(config_of(tiny(), PAIR, **options))
    assert engine.num_slots == len(engine.drafter._model.model._held) == 7
    of_model, of_base = budgets
    assert 2 < of_base.slot_bytes / of_model.slot_bytes < 4  # three roles
    assert of_model.place == of_base.place


class Counting:
    """A model that takes the seconds it is told and is right as often as it is told."""

    def __init__(self, clock, seconds, is_right):
        self.clock, self.seconds, self.is_right, self.num_asked = clock, seconds, is_right, 0

    def propose(self, requests):
        self.num_asked += 1
        self.clock[0] += self.seconds
        if self.is_right is None:  # it knows: every other proposal is right
            return [Proposed(*((7, 0.9) if self.num_asked % 2 else (8, 0.1))) for _ in requests]
        return [Proposed(7 if self.is_right else 8, 0.9) for _ in requests]


class Row:
    """A running row as far as a model is asked about it; it draws 7 again and again."""

    def __init__(self, at):
        self.key, self.variant, self.tokens, self.max_tokens = (f"r{at}", 0, 0), 0, [], 24
        self.step_terms = type("Terms", (), {"draw": None})

    def uniform(self, ahead):
        return 0.5


def simulated(monkeypatch, *, num_rows, pass_s, position_s, model_s, is_right, num_steps=3000):
    """Tokens for each second with a model and without, of a base with such passes."""
    clock = [0.0]
    monkeypatch.setattr("pipeline.engine.model_drafts.time.monotonic", lambda: clock[0])
    pace, rates, rows = Pace(), Rates(), [Row(at) for at in range(num_rows)]
    model = Counting(clock, model_s, is_right)
    drafts = ModelDrafts(model, rates, pace, (1.0, 1.0))
    tokens = 0
    for _ in range(num_steps):
        asked = [Asked(at, row, [1], 8) for at, row in enumerate(rows)]
        guesses = drafts.guess(asked, num_rows=num_rows, most=min(8 * num_rows, 32), may_try=True)
        is_probe = bool(guesses) and pace.begins_probe()
        num_positions = num_rows
        for each in asked:
            chance, still_right = 1.0, True
            for proposal in each.proposals:
                chance *= rates.of(proposal.keys[0])
                is_verified = is_probe or pace.is_worth(chance, num_rows, num_positions, spent_s=drafts.spent_s)
                num_positions += is_verified
                if still_right:
                    still_right = proposal.token == 7
                    tokens += still_right and is_verified
                    for key in proposal.keys:
                        rates.note(key, is_hit=still_right)
        tokens += num_rows
        taken_s = pass_s + position_s * num_positions
        clock[0] += taken_s
        drafts.completed(taken_s)
        pace.note(num_positions, taken_s)
    return tokens / clock[0] * (pass_s + position_s * num_rows) / num_rows, model.num_asked / num_steps


@pytest.mark.parametrize("model_s", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("is_right", [False, True])
def test_a_full_batch_that_waits_for_arithmetic_is_hardly_slower(monkeypatch, model_s, is_right):
    costs = {"num_rows": 16, "pass_s": 0.01, "position_s": 0.02, "model_s": model_s}
    speed, _ = simulated(monkeypatch, **costs, is_right=is_right)
    assert speed > 0.97


def test_a_model_is_asked_where_its_passes_pay_and_hardly_elsewhere(monkeypatch):
    costs = {"num_rows": 1, "pass_s": 0.1, "position_s": 0.002}
    speed, asked = simulated(monkeypatch, **costs, model_s=0.01, is_right=True)
    assert speed > 3
    assert asked > 4
    for model_s, is_right in ((0.01, False), (0.2, True)):
        speed, asked = simulated(monkeypatch, **costs, model_s=model_s, is_right=is_right)
        assert speed > 0.97
        assert asked < 0.2


def test_a_model_that_knows_when_it_is_right_is_asked_for_that(monkeypatch):
    """Half of what it proposes is not worth verifying, and costs its pass alone."""
    costs = {"num_rows": 1, "pass_s": 0.1, "position_s": 0.06, "model_s": 0.02}
    speed, asked = simulated(monkeypatch, **costs, is_right=None)
    assert speed > 1.05
    assert asked > 0.9


def test_a_trial_is_small(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("pipeline.engine.model_drafts.time.monotonic", lambda: clock[0])
    pace = Pace()
    pace.note(16, 1.0)
    drafts = ModelDrafts(Counting(clock, 0.1, True), Rates(), pace, (1.0, 1.0))
    found = drafts.guess([Asked(at, Row(at), [1], 8) for at in range(16)], num_rows=16, most=32, may_try=True)
    assert sum(len(each.tokens) for each in found.values()) == TRIED
    assert drafts.guess([], num_rows=16, most=32, may_try=True) == {}
    unasked = ModelDrafts(Counting(clock, 0.1, True), Rates(), pace, (1.0, 1.0))
    assert unasked.guess([Asked(0, Row(0), [1], 8)], num_rows=16, most=32, may_try=False) == {}


def test_a_rows_text_is_left_as_it_is(monkeypatch):
    clock, requested = [0.0], []
    monkeypatch.setattr("pipeline.engine.model_drafts.time.monotonic", lambda: clock[0])

    class Noting(Counting):
        def propose(self, requests):
            requested.extend(list(each.text) for each in requests)
            return super().propose(requests)

    pace = Pace()
    pace.note(1, 1.0)
    text, row = [5, 6], Row(0)
    ModelDrafts(Noting(clock, 0.1, True), Rates(), pace, (1.0, 1.0)).guess(
        [Asked(0, row, text, 8)], num_rows=1, most=8, may_try=True
    )
    assert requested[:2] == [[5, 6], [5, 6, 7]]
    assert text == [5, 6]


def test_reading_long_prompts_for_short_answers_is_not_worth_it(monkeypatch):
    clock, pace = [0.0], Pace()
    monkeypatch.setattr("pipeline.engine.model_drafts.time.monotonic", lambda: clock[0])

    class Reading(Counting):
        def propose(self, requests):
            new = [each for each in requests if len(each.text) == 3000]
            self.seconds = 0.001 + 0.2 * len(new)
            return super().propose(requests)

    model = Reading(clock, 0.0, True)
    drafts, num_reads = ModelDrafts(model, Rates(), pace, (1.0, 1.0)), []
    for at in range(200):  # rows of 4 tokens, one after another
        row = Row(at)
        for step in range(4):
            row.tokens = [7] * step
            asked = Asked(0, row, [1] * (3000 + step), 4)
            began_s = clock[0]
            drafts.guess([asked], num_rows=1, most=4, may_try=True)
            num_reads.append(clock[0] - began_s > 0.2)
            clock[0] += 0.01
            drafts.completed(0.01)
            pace.note(1, 0.01)
        drafts.end(row)
    assert 1 <= sum(num_reads) < 5


def test_a_model_whose_weights_need_a_gpu_is_refused_before_it_is_loaded(tiny, monkeypatch):
    checked = []
    monkeypatch.setattr(
        "pipeline.runtime.replica_plan.check_device",
        lambda needs, name, *, capability: checked.append((name, capability)),
    )
    assemble(config_of(tiny(), PAIR, decoding={"draft": ["model"], "draft_model": str(tiny(seed=2))}), NOWHERE)
    assert (f"decoding.draft_model: {tiny(seed=2)}", None) in checked


@pytest.mark.parametrize(
    ("device", "base", "transport", "found"),
    [
        ("auto", "auto", "local", "auto"),
        ("auto", "cpu", "local", "cpu"),
        ("auto", "auto", "ray", "cpu"),
        ("cuda:1", "cpu", "local", "cuda:1"),
    ],
)
def test_the_model_is_beside_the_coordinator(tiny, device, base, transport, found):
    decoding = {"draft": ["model"], "draft_model": {"model": str(tiny(seed=2)), "device": device}}
    sections = {"cluster": {"transport": transport}, "decoding": decoding}
    assembly = assemble(config_of({"model": str(tiny()), "device": base}, PAIR, **sections), NOWHERE)
    assert assembly.draft.device == found


def test_over_ray_the_coordinator_has_no_gpu_for_the_model(tiny):
    decoding = {"draft": ["model"], "draft_model": {"layers": 1, "device": "cuda"}}
    with pytest.raises(
        ConfigurationError, match=r"decoding\.draft_model\.device: cuda needs cluster\.transport: local"
    ):
        assemble(config_of(tiny(), PAIR, decoding=decoding), NOWHERE)


def test_a_model_that_finds_no_memory_at_its_start_is_left_out(tiny, monkeypatch):
    def lacks(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("pipeline.worker.start.start_drafting", lacks)
    config = config_of(tiny(), PAIR, decoding={"draft": ["model"], "draft_model": str(tiny(seed=2))})
    with pytest.warns(RuntimeWarning, match="proposes tokens: no room; the run goes on without it"):
        engine, _ = engine_of(config)
    assert len(list(decode_rows(engine, MANY_ROWS[:2]))) == 2


def test_hosts_whose_device_verifies_nothing_are_named(tiny, monkeypatch):
    monkeypatch.setattr(engines, "_rows_of_slot", lambda client: None)
    config = config_of(tiny(), PAIR, decoding={"draft": ["lookup"]})
    with pytest.warns(RuntimeWarning, match="decoding.draft has no effect.* no proposed tokens: base"):
        engine, _ = engine_of(config)
    assert engine.drafter is None


@pytest.mark.parametrize(
    "kind",
    ["reward_model", "tokens", "states", "unsaid", "rows", "layers", "shared", "embedding", "gone", "adapter", "t5"],
)
def test_models_that_cannot_propose_are_refused_before_they_are_loaded(tiny, judge, tmp_path, kind):
    if kind == "reward_model":
        model, says = str(judge()), "is a reward model"
    elif kind == "tokens":
        model = str(make_model(tmp_path / "m", tokenizer=make_pair_tokenizer()))
        says = r"has other tokens than the base, so it can propose none \([\d,]+ of 26\d ids differ: "
    elif kind == "states":
        model, says = str(make_family(tmp_path / "m", "lfm2")), "keeps states"
    elif kind == "unsaid":  # in its config.json, that is
        model, says = str(make_family(tmp_path / "m", "mamba")), "keeps states"
    elif kind == "rows":
        model, says = str(make_family(tmp_path / "m", "codegen")), "is not decoded in slots"
    elif kind == "layers":
        model, says = {"layers": 2}, "has 2 layers; draft_model.layers must be below that, got 2"
    elif kind == "shared":
        model = {"model": str(make_family(tmp_path / "m", "gemma3n_text")), "layers": 1}
        says = r"layers that share keys or weights \(num_kv_shared_layers\)"
    elif kind == "gone":
        model, says = str(tmp_path / "gone"), "no model folder"
    elif kind == "adapter":
        make_lora(tmp_path / "m", tiny(), "q_proj")
        model, says = str(tmp_path / "m"), "It is a LoRA adapter: .*merge it into its model"
    elif kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        T5ForConditionalGeneration(T5Config(vocab_size=261, **sizes)).save_pretrained(tmp_path / "m")
        make_tokenizer().save_pretrained(tmp_path / "m")
        model, says = str(tmp_path / "m"), "it is an encoder-decoder"
    else:
        folder = make_model(tmp_path / "m")
        small = AutoModelForCausalLM.from_pretrained(folder)
        small.resize_token_embeddings(200)
        small.save_pretrained(folder)
        model, says = str(folder), "has an embedding of 200 rows"
    config = config_of(tiny(), PAIR, decoding={"draft": ["model"], "draft_model": model})
    with pytest.raises(ConfigurationError, match=says) as raised:
        assemble(config, NOWHERE)
    assert str(raised.value).startswith("decoding.draft_model: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("decoding", "says"),
    [
        ({"draft": ["model"]}, "model needs a model; set decoding.draft_model"),
        ({"draft": "off", "draft_model": "x"}, "draft_model has no effect with draft: off"),
        ({"draft": ["lookup"], "draft_model": "x"}, r"draft_model has no effect with draft: \[lookup\]"),
        ({"draft": "auto", "draft_model": "x", "unit": "answer"}, "draft_model has no effect: unit is answer, and"),
        ({"draft": "auto", "draft_model": "x", "target_kl": 0.5}, "draft_model has no effect: target_kl is set"),
        ({"draft": ["model"], "draft_model": {}}, "name a model, or give the number of the base's layers; got nei"),
        ({"draft": ["model"], "draft_model": {"layers": 2, "revision": "v"}}, "got revision: v of no model"),
        ({"draft": ["model"], "draft_model": {"layers": 0}}, "greater than or equal to 1"),
        ({"draft": ["reference"]}, "known with the pass that draws it, so it proposes nothing"),
    ],
)
def test_what_has_no_effect_is_refused(decoding, says):
    with pytest.raises(ConfigurationError, match=says):
        config_of("base", PRINCIPALS, decoding=decoding)


def test_a_run_has_the_same_bytes_and_the_plan_names_the_model(tiny, sketch, free_passes, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    folder = sketch()

    def config(name, **draft):
        decoding = {"max_new_tokens": 16, **ALIKE, **draft}
        return job(prompts, tmp_path / name, tiny(), decoding=decoding, cluster={"slots": 2})

    plain, _ = run_job(config("off"), tmp_path)
    with_model = config("on", draft=["model"], draft_model=str(folder))
    drafted, _ = run_job(with_model, tmp_path)
    assert parts(tmp_path / "off") == parts(tmp_path / "on")
    assert plain.plan.fingerprint == drafted.plan.fingerprint
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "on/_commits").iterdir())]
    assert all(record["passes"] + record["accepted"] == record["tokens"] for record in records)
    assert drafted.status().accepted > 5
    prepared = prepare(with_model, NOWHERE)
    text = describe_plan(prepared.plan, plan_replica(with_model, prepared.models, NOWHERE))
    assert f"drafts    model ({folder})" in text
    assert any(line.startswith("draft ") and "auto" in line for line in text.splitlines())
    assert run_job(config("on"), tmp_path)[1] is False  # complete, whatever is said of drafts
