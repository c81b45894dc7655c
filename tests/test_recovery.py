"""Hosts that lose their state, their memory or their life: it costs time, never a result."""

from __future__ import annotations

import string

import pytest
import torch
from support.decoding import ask
from support.unreliable import ROWS, Replica, failed, nothing

from pipeline.errors import CageError
from pipeline.protocol.messages import DRAWN

WAYS = [{"num_groups": 1}, {"num_groups": 2}, {"runs_ahead": True}]


@pytest.mark.parametrize("way", WAYS)
def test_a_state_lost_between_any_two_calls_changes_nothing(tiny, way):
    replica = Replica(tiny, **way)
    reference, engine = replica.decode(nothing)
    assert len(reference) == len(ROWS)
    calls = {host.name: host.calls for host in engine.calls.hosts.all}
    for name, count in calls.items():
        for moment in range(1, count + 1):

            def lose(host, number, method, args, name=name, moment=moment):
                if number == moment and host.name == name:
                    host.forget()

            records, engine = replica.decode(lose)
            assert records == reference
            assert engine.recoveries.states_lost <= 2 * way.get("num_groups", 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_host_that_dies_at_any_call_is_replaced_and_changes_nothing(tiny, way):
    replica = Replica(tiny, **way)
    reference, engine = replica.decode(nothing)
    for moment in range(1, engine.calls.hosts.base.calls + 1, 2):
        died = []

        def die(host, number, method, args, moment=moment, died=died):
            if number == moment and host.name == "base" and not died:
                died.append(method)
                return failed("host base died")
            return None

        records, engine = replica.decode(die)
        assert records == reference
        assert engine.recoveries.hosts_failed == 1


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_relaxed_rows_are_prefilled_again_with_the_tokens_they_have(tiny, runs_ahead):
    replica = Replica(tiny, reproducibility="relaxed", runs_ahead=runs_ahead)
    reference, engine = replica.decode(nothing)
    kept, steps = [], []

    def lose_once(host, number, method, args):
        if method.startswith("advance_and"):
            kept.extend(admission.answer for admission in args[1].admissions)
            steps.append(args[0])
            if len(steps) == 3:
                host.forget()

    records, engine = replica.decode(lose_once)
    assert engine.recoveries.states_lost == 1
    assert {key: record.num_tokens for key, record in records.items()} == {
        key: record.num_tokens for key, record in reference.items()
    }
    assert any(kept)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_state_that_is_lost_again_and_again_ends_in_an_error(tiny, num_steps):
    """Also where a step or two of a row succeed in between."""
    replica = Replica(tiny, max_failures=3)

    def again_and_again(host, number, method, args):
        if method == "values_at" and args[0].step >= num_steps:
            host.forget()

    with pytest.raises(CageError, match="4 hosts failed and no row was finished"):
        replica.decode(again_and_again)


@pytest.mark.parametrize("bad", [{"r0"}, {"r3"}, {"r1", "r4"}, {"r0", "r1", "r2", "r3", "r4"}])
@pytest.mark.parametrize(("slots", "way"), [(1, WAYS[0]), (3, WAYS[0]), (5, WAYS[1]), (3, WAYS[2])])
def test_a_row_that_kills_its_host_is_failed_and_its_neighbours_are_not(tiny, bad, slots, way):
    replica = Replica(tiny, slots=slots, **way)
    rows = [ask(f"r{at}", ("!" if f"r{at}" in bad else "?") * (at + 1)) for at in range(5)]
    reference, _ = replica.decode(nothing, rows)
    mark = token_of(replica, "!")

    def die_of_poison(host, number, method, args):
        if method.startswith("advance") and any(
            mark in prompt for a in args[1].admissions for prompt in a.prompts.values()
        ):
            return failed("host base died")
        return None

    records, _ = replica.decode(die_of_poison, rows)
    assert {key for key, record in records.items() if record.is_failed} == bad
    assert all("alone at last: host base died" in records[key].error for key in bad)
    assert all(records[key] == reference[key] for key in records.keys() - bad)


def token_of(replica, text):
    """The token that only a prompt with `text` has."""

    def tokens_of(text):
        return set(replica.assembly.prompter.encode(ask("a", text).messages, {})["base"])

    (token,) = tokens_of(text) - tokens_of("?")
    return token


def test_hosts_that_fail_whatever_they_decode_end_in_an_error_within_bounds(tiny):
    replica = Replica(tiny, max_failures=5)
    with pytest.raises(CageError, match="6 hosts failed and no row was finished in between; gone"):
        replica.decode(lambda *_: failed("gone"))


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_halves_the_rows_at_once_and_changes_nothing(tiny, error, runs_ahead):
    replica = Replica(tiny, slots=5, runs_ahead=runs_ahead)
    reference, _ = replica.decode(nothing)
    runner = replica.runners["base" if runs_ahead else "arm"]
    plain = runner.advance

    def needs_much(step):
        if len(step.slots) > 2:
            raise error
        plain(step)

    runner.advance = needs_much
    records, engine = replica.decode(nothing)
    assert records == reference
    assert engine.recoveries.memory_halved == 1
    assert runner.num_slots == 2


def test_a_row_that_does_not_fit_alone_is_failed(tiny):
    replica = Replica(tiny, slots=4)
    mark = token_of(replica, "!")
    reference, _ = replica.decode(nothing)
    runner = replica.runners["base"]
    plain = runner.advance

    def too_long(step):
        if any(mark in prompt for admission in step.admissions for prompt in admission.prompts.values()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(step)

    runner.advance = too_long
    records, _ = replica.decode(nothing, [ROWS[0], ask("large", "!"), *ROWS[1:]])
    assert "no memory" in records.pop("large").error
    assert records == reference


def test_a_host_gives_its_values_before_it_begins_the_next_groups_step(tiny):
    """Otherwise they wait behind a forward pass, and the games are hidden behind nothing."""
    calls = []
    Replica(tiny, num_groups=2).decode(lambda host, _, method, args: calls.append((host.name, method, args)))
    calls = [(name, method, args[0]) for name, method, args in calls if method != "score"]
    on_base = [(method, at) for name, method, at in calls if name == "base"]
    on_other = [(method, at) for name, method, at in calls if name != "base"]
    assert {method for method, _ in on_base} == {"advance_and_propose"}
    assert {at.group for _, at in on_base} == {0, 1}
    assert [method for method, _ in on_other] == ["advance", "values_at"] * len(on_base)
    assert [at for _, at in on_other[::2]] == [at for _, at in on_other[1::2]] == [at for _, at in on_base]


def test_a_lone_host_is_sent_steps_before_their_tokens_are_there(tiny):
    """What it draws and what comes out are the same, also of rows that end when a step more was sent."""
    replica = Replica(tiny, runs_ahead=True, stop=string.printable)
    expected, engine = replica.decode(nothing)
    assert {record.finish_reason for record in expected.values()} == {"stop", "length"}
    replica.runs_ahead = False
    waiting, other = replica.decode(nothing)
    assert waiting == expected
    assert engine.num_row_steps == other.num_row_steps == sum(record.num_tokens for record in expected.values())
    replica.runs_ahead, sent = True, []
    replica.decode(lambda host, number, method, args: sent.extend(args[1].tokens if method != "score" else []))
    assert set(sent) == {DRAWN}
    assert len(sent) > engine.num_row_steps - len(expected)
