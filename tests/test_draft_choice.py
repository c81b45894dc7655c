"""What is proposed, when it pays, what is not drafted by name, and what a run says of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.decoding import NOWHERE, ask, config_of, engine_of
from support.families import make_family
from support.runs import PRINCIPALS, job, parts, run_job, write_prompts
from support.tiny_models import make_model, make_pair_tokenizer

from jobs.commands.plan import describe_plan
from jobs.commands.status import describe_status
from pipeline.config.files import load_config
from pipeline.engine import drafting
from pipeline.engine.engine import decode_rows
from pipeline.engine.pace import PROBES, Pace
from pipeline.engine.passages import LONGEST, PLACES, START, Passages
from pipeline.errors import ConfigurationError
from pipeline.protocol.specs import Drafts
from pipeline.runtime.assembly import assemble
from pipeline.runtime.replica_plan import plan_replica
from pipeline.stages.relabel import prepare

TOKENS = st.lists(st.integers(0, 2), max_size=24)


@given(st.lists(TOKENS, max_size=3), TOKENS)
def test_what_follows_the_longest_suffix_is_found(sequences, text):
    passages = Passages()
    for sequence in sequences:
        passages.extend(passages.begin(), sequence)
    padded, tail = [[START, START, *each] for each in sequences], [START, START, *text]

    def same(sequence, at):
        pairs = zip(reversed(sequence[:at]), reversed(tail), strict=False)
        length = next((count for count, (left, right) in enumerate(pairs) if left != right), min(at, len(tail)))
        return min(length, LONGEST)

    lengths = [same(sequence, at) for sequence in padded for at in range(2, len(sequence))]
    longest = max(lengths, default=0)
    found = passages.find(text, 4)
    if longest < 2:
        assert found is None
        return
    # of many equal places the newest are looked at
    assert found.length == longest or lengths.count(longest) < len([each for each in lengths if each >= 2]) - 8
    assert any(found.tokens == sequence[at : at + 4] for sequence in padded for at in range(2, len(sequence)))


def test_of_a_pair_the_newest_places_are_kept():
    passages = Passages()
    for at in range(2 * PLACES):
        passages.extend(passages.begin(), [1, 2, 100 + at])
    assert passages.find([1, 2], 1).tokens == [100 + 2 * PLACES - 1]
    assert {len(places) for places in passages._places.values()} <= {*range(1, PLACES + 1)}


def pace_after(seconds_of, positions):
    pace = Pace()
    for num_positions in positions:
        pace.note(num_positions, seconds_of(num_positions))
    return pace


def test_a_proposal_is_worth_its_position_where_passes_wait_for_memory_and_not_where_they_wait_for_arithmetic():
    positions = [16] * 10 + [32, 32, 20] + [16] * 10
    assert pace_after(lambda num: 1.0 + 0.001 * num, positions).is_worth(0.1, 16, 16)
    assert not pace_after(lambda num: 0.02 * num, positions).is_worth(0.99, 16, 16)
    half = pace_after(lambda num: 0.16 + 0.01 * num, positions)  # a position costs half of its share of the pass
    assert half.is_worth(0.7, 16, 16)
    assert not half.is_worth(0.5, 16, 16)
    assert half.seconds(48) == pytest.approx(0.64)


def test_what_a_pass_costs_is_learned_from_few_larger_passes():
    pace = pace_after(lambda num: 0.02 * num, [16] * (PROBES + 1))
    assert not pace.is_worth(1.0, 16, 16)  # nothing is known
    num_probes = 0
    for _ in range(2000):
        probes = pace.begins_probe()
        num_probes += probes
        pace.note(32 if probes else 16, 0.64 if probes else 0.32)
    assert 3 <= num_probes <= 20
    assert not pace.is_worth(0.9, 16, 16)


REFUSED = {
    "unit is block": {"decoding": {"unit": "block", "draft": "lookup"}},
    "target_kl is set": {"decoding": {"target_kl": 0.1, "draft": ["lookup"]}},
    "needs existing answers": {"decoding": {"draft": ["response"]}},
    "needs several answers": {"decoding": {"draft": ["siblings"]}},
    "names each source once": {"decoding": {"draft": ["lookup", "lookup"]}},
    "a list of response, siblings, lookup, model; got 'guess'": {"decoding": {"draft": ["guess"]}},
}


@pytest.mark.parametrize("words", REFUSED)
def test_drafts_without_an_effect_are_refused(words):
    with pytest.raises(ConfigurationError, match=words):
        config_of("base", PRINCIPALS, **REFUSED[words])


@pytest.mark.parametrize("kind", ["states", "unsaid", "rows", "reward_model", "tokens"])
def test_hosts_that_verify_nothing_are_named_and_named_sources_refused(tiny, judge, tmp_path, kind):
    base, principals = {"model": str(tiny())}, dict(PRINCIPALS)
    if kind == "states":
        base, says = {"model": str(make_family(tmp_path / "m", "lfm2"))}, "keeps states"
    elif kind == "unsaid":  # config.json does not say that its layers keep states
        base, says = {"model": str(make_family(tmp_path / "m", "mamba"))}, "keeps states"
    elif kind == "rows":
        base, says = {**base, "attention": "plain"}, "one row at a time"
    elif kind == "tokens":
        other = make_model(tmp_path / "m", tokenizer=make_pair_tokenizer())
        principals["other"] = {"kind": "arm", "model": str(other), "reference": "none"}
        says = "tokens of its own"
    else:
        principals["judge"] = {"kind": "reward_model", "model": str(judge())}
        says = "scores candidates"

    def config(draft, **decoding):
        of_input = {"path": str(write_prompts(tmp_path / "in.jsonl"))}
        return config_of(base, principals, decoding={"draft": draft, **decoding}, input=of_input)

    prepared = prepare(config("auto"), NOWHERE)
    replica = plan_replica(config("auto"), prepared.models, NOWHERE)
    assert len(replica.undrafted) == 1
    assert says in replica.undrafted[0]
    assert f"drafts    none: {replica.undrafted[0]}" in describe_plan(prepared.plan, replica)
    assert {spec.drafts for spec in replica.hosts} == {Drafts.NOWHERE}
    with pytest.raises(ConfigurationError, match=rf"decoding\.draft: \[lookup\] has no effect: .*{says}"):
        assemble(config("lookup"), NOWHERE)
    with pytest.raises(ConfigurationError, match=rf"decoding\.draft_model has no effect: .*{says}"):
        assemble(config("auto", draft_model=str(tiny())), NOWHERE)


@pytest.mark.parametrize("section", [{"device": "cuda"}, {"pipeline_parallel": 2}])
def test_the_plan_says_what_passes_on_a_gpu_have_room_for(tiny, tmp_path, section):
    def described(**cluster):
        sections = {"cluster": cluster, "input": {"path": str(write_prompts(tmp_path / "in.jsonl"))}}
        base = {"model": str(tiny()), **section}
        config = config_of(base, PRINCIPALS, decoding={"draft": ["lookup"]}, **sections)
        prepared = prepare(config, NOWHERE)
        replica = plan_replica(config, prepared.models, NOWHERE)
        assert replica.hosts[0].drafts
        text = describe_plan(prepared.plan, replica)
        return next(line for line in text.splitlines() if line.startswith("drafts "))

    assert described(slots=4).endswith(
        "a full batch of 4 slots has room for 17 on a GPU, each slot without a row for one more"
    )
    assert described(slots=21).endswith("has room for 0 on a GPU, each slot without a row for one more")
    assert described(slots="auto").endswith("where that takes less time")


def test_a_run_counts_its_passes_and_its_bytes_are_those_of_a_run_without_drafts(tiny, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4)
    grid = {"rules": ["equilibrium", "linear"], "agent_temperatures": [0.5, 0.8, 2.0]}

    def config(name, draft):
        decoding = {"max_new_tokens": 24, "draft": draft}
        return job(prompts, tmp_path / name, tiny(), grid=grid, decoding=decoding, cluster={"slots": 2})

    plain, _ = run_job(config("off", "off"), tmp_path)
    drafted, _ = run_job(config("on", ["siblings", "lookup"]), tmp_path)
    assert parts(tmp_path / "off") == parts(tmp_path / "on")
    assert plain.plan.fingerprint == drafted.plan.fingerprint
    assert run_job(config("on", "off"), tmp_path)[1] is False  # the run is complete whatever is said of drafts
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "on/_commits").iterdir())]
    assert all(record["passes"] + record["accepted"] == record["tokens"] for record in records)
    assert plain.status().passes == plain.status().tokens == drafted.status().tokens
    if accepted := drafted.status().accepted:  # passes of so small a model pay or not, by the machine
        assert f"drafts    {accepted:,} tokens were proposed and drawn" in describe_status(drafted)
    assert "drafts" not in describe_status(plain)


def test_draft_off_is_read_from_yaml_and_words(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("decoding: {draft: off}\nbase: {model: base}\ninput: {path: x}\noutput: {path: y}\n")
    assert load_config(file, []).decoding.draft == "off"
    assert load_config(file, ["decoding.draft=auto"]).decoding.draft == "auto"
    assert load_config(file, ["decoding.draft=off"]).decoding.draft == "off"


class ArithmeticPace(Pace):
    """Passes that wait for arithmetic alone: every position takes as long, as in a full batch on a CPU."""

    def note(self, num_positions, seconds):
        super().note(num_positions, 0.02 * num_positions)


@pytest.mark.parametrize("draws", [{"temperature": 0.0}, {"temperature": 0.3, "n": 3}, {"n": 3}])
def test_a_full_batch_loses_next_to_nothing_to_drafts(tiny, monkeypatch, draws):
    """There a token that is verified and not drawn takes as long as one that is drawn."""
    monkeypatch.setattr(drafting, "Pace", ArithmeticPace)
    config = config_of(tiny(), PRINCIPALS, decoding={"max_new_tokens": 32, **draws}, cluster={"slots": 16})
    engine, _ = engine_of(config)
    rows = [ask(f"r{at}", "tell me " * (at % 5) + "x" * at) for at in range(32)]
    records = decode_rows(engine, rows, num_variants=1, num_samples=config.decoding.n)
    tallies = engine.drafter.tallies.values()
    num_tokens = sum(record.num_tokens for record in records)
    assert num_tokens > 1000
    assert 0 < sum(tally.drafted for tally in tallies) <= 15
    assert sum(tally.drafted - tally.accepted for tally in tallies) <= 6
