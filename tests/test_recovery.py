"""Hosts that lose their state, their memory or their life: it costs time, never a result."""

from __future__ import annotations

import string

import pytest
import torch
from support.decoding import NOWHERE, ask, config_of

from pipeline.config.sections import RuleName
from pipeline.engine.engine import Engine
from pipeline.engine.row_state import Terms
from pipeline.errors import CageError, HostError, HostOutOfMemory, StateLost
from pipeline.protocol.clients import Answer, LocalHost
from pipeline.protocol.messages import DRAWN, Admission, Position, Step
from pipeline.runtime.assembly import assemble
from pipeline.worker.hosts import PositionedHost
from pipeline.worker.loading import load_host
from pipeline.worker.sampling_host import SamplingHost

ROWS = [ask(f"r{at}", "x" * (3 * at % 7 + 1), response="fine" if at % 2 else None) for at in range(5)]
PRINCIPALS = {"kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7}}


class Unreliable:
    """A host client that does something before its calls; `before(number, method, args)` may answer instead."""

    def __init__(self, inner, before):
        self.inner, self.before, self.calls = inner, before, 0

    def submit(self, method, *args, **kwargs):
        self.calls += 1
        answer = self.before(self, self.calls, method, args)
        return answer or self.inner.submit(method, *args, **kwargs)

    def forget(self):
        """What a new process would know: nothing."""
        self.inner.host.resize(self.inner.host._host._num_slots)


class Replica:
    """An engine whose hosts run `before`; the hosts are loaded once."""

    def __init__(
        self, tiny, *, slots=3, num_groups=1, runs_ahead=False, reproducibility="strict", max_failures=20, stop=()
    ):
        arm = {"kind": "arm", "model": str(tiny(seed=5)), "reference": "none", "weight": 0.1}
        self.config = config_of(
            tiny(),
            PRINCIPALS if runs_ahead else {**PRINCIPALS, "arm": arm},
            decoding={
                "max_new_tokens": 4,
                "agent_temperature": 0.5,
                "trace": "tokens",
                "reproducibility": reproducibility,
                "stop": list(stop),
            },
            cluster={"slots": slots},
        )
        self.options = {
            "num_slots": slots,
            "num_groups": num_groups,
            "runs_ahead": runs_ahead,
            "max_failures": max_failures,
        }
        self.assembly = assemble(self.config, NOWHERE)
        self.plans = {plan.name: plan for plan in self.assembly.topology.hosts}
        self.loaded = {spec.name: load_host(spec) for spec in self.assembly.hosts}

    def hosts(self, before):
        for host in self.loaded.values():
            host.resize(self.options["num_slots"])
        principals = self.assembly.topology.principals
        checked = {
            name: SamplingHost(host, self.plans[name].roles, self.config.decoding, principals)
            for name, host in self.loaded.items()
        }
        return {name: Unreliable(LocalHost(host, self.plans[name]), before) for name, host in checked.items()}

    def decode(self, before, rows=ROWS):
        """Records by id, and the engine; hosts that fail are replaced."""
        hosts = self.hosts(before)
        assembly = self.assembly
        engine = Engine(
            assembly.topology, hosts, assembly.prompter, self.config.decoding, assembly.variants, **self.options
        )
        records, waiting = {}, list(rows)
        while waiting or not engine.is_idle:
            while engine.has_room and waiting:
                engine.admit(waiting.pop(0))
            try:
                found = engine.step()
            except HostError as error:
                engine.recover(self.hosts(before), error)
                continue
            assert not records.keys() & {record.row_id for record in found}
            records |= {record.row_id: record for record in found}
        return records, engine


def nothing(*_):
    return None


WAYS = [{"num_groups": 1}, {"num_groups": 2}, {"runs_ahead": True}]


@pytest.mark.parametrize("way", WAYS)
def test_a_state_lost_between_any_two_calls_changes_nothing(tiny, way):
    replica = Replica(tiny, **way)
    reference, engine = replica.decode(nothing)
    assert len(reference) == len(ROWS)
    calls = {name: host.calls for name, host in engine.calls.hosts.items()}
    for name, count in calls.items():
        for moment in range(1, count + 1):

            def lose(host, number, method, args, name=name, moment=moment):
                if number == moment and host.inner._plan.name == name:
                    host.forget()

            records, engine = replica.decode(lose)
            assert records == reference
            assert engine.recoveries.states_lost <= 2 * way.get("num_groups", 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_host_that_dies_at_any_call_is_replaced_and_changes_nothing(tiny, way):
    replica = Replica(tiny, **way)
    reference, engine = replica.decode(nothing)
    for moment in range(1, engine.calls.hosts["base"].calls + 1, 2):
        died = []

        def die(host, number, method, args, moment=moment, died=died):
            if number == moment and host.inner._plan.name == "base" and not died:
                died.append(method)
                return Answer(error=HostError("host base died"))
            return None

        records, engine = replica.decode(die)
        assert records == reference
        assert engine.recoveries.hosts_failed == 1


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_relaxed_rows_are_prefilled_again_with_the_tokens_they_have(tiny, runs_ahead):
    replica = Replica(tiny, reproducibility="relaxed", runs_ahead=runs_ahead)
    reference, engine = replica.decode(nothing)
    admitted, steps = [], []

    def lose_once(host, number, method, args):
        if method.startswith("advance_and"):
            admitted.extend(len(admission.prompts["base"]) for admission in args[1].admissions)
            steps.append(args[0])
            if len(steps) == 3:
                host.forget()

    records, engine = replica.decode(lose_once)
    assert engine.recoveries.states_lost == 1
    assert {key: record.num_tokens for key, record in records.items()} == {
        key: record.num_tokens for key, record in reference.items()
    }
    lengths = [len(engine._prompter.encode(row.messages)["base"]) for row in ROWS]
    assert any(length not in lengths for length in admitted)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_state_that_is_lost_again_and_again_ends_in_an_error(tiny, num_steps):
    """Also where a step or two of a row succeed in between."""
    replica = Replica(tiny, max_failures=3)

    def again_and_again(host, number, method, args):
        if method == "logprobs_at" and args[0].step >= num_steps:
            host.forget()

    with pytest.raises(CageError, match="4 hosts failed and no row was finished"):
        replica.decode(again_and_again)


@pytest.mark.parametrize("bad", [{"r0"}, {"r3"}, {"r1", "r4"}, {"r0", "r1", "r2", "r3", "r4"}])
@pytest.mark.parametrize(("slots", "way"), [(1, WAYS[0]), (3, WAYS[0]), (5, WAYS[1]), (3, WAYS[2])])
def test_a_row_that_kills_its_host_is_rejected_and_its_neighbours_are_not(tiny, bad, slots, way):
    replica = Replica(tiny, slots=slots, **way)
    rows = [ask(f"r{at}", ("!" if f"r{at}" in bad else "?") * (at + 1)) for at in range(5)]
    reference, _ = replica.decode(nothing, rows)
    mark = token_of(replica, "!")

    def die_of_poison(host, number, method, args):
        if method.startswith("advance") and any(
            mark in prompt for a in args[1].admissions for prompt in a.prompts.values()
        ):
            return Answer(error=HostError("host base died"))
        return None

    records, _ = replica.decode(die_of_poison, rows)
    assert {key for key, record in records.items() if record.is_rejected} == bad
    assert all("alone at last: host base died" in records[key].error for key in bad)
    assert all(records[key] == reference[key] for key in records.keys() - bad)


def token_of(replica, text):
    """The token that tells a prompt with `text` from another."""
    encode = replica.assembly.prompter.encode
    (token,) = set(encode(ask("a", text).messages)["base"]) - set(encode(ask("a", "?").messages)["base"])
    return token


def test_hosts_that_fail_whatever_they_decode_end_in_an_error_within_bounds(tiny):
    replica = Replica(tiny, max_failures=5)
    with pytest.raises(CageError, match="6 hosts failed and no row was finished in between; gone"):
        replica.decode(lambda *_: Answer(error=HostError("gone")))


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_halves_the_rows_at_once_and_changes_nothing(tiny, error, runs_ahead):
    replica = Replica(tiny, slots=5, runs_ahead=runs_ahead)
    reference, _ = replica.decode(nothing)
    host = replica.loaded["base" if runs_ahead else "arm"]
    plain = host.advance

    def needs_much(admissions, slots, tokens):
        if len(slots) > 2:
            raise error
        plain(admissions, slots, tokens)

    host.advance = needs_much
    records, engine = replica.decode(nothing)
    assert records == reference
    assert engine.recoveries.memory_halved == 1
    assert host._num_slots == 2


def test_a_row_that_does_not_fit_alone_is_rejected(tiny):
    replica = Replica(tiny, slots=4)
    mark = token_of(replica, "!")
    reference, _ = replica.decode(nothing)
    host = replica.loaded["base"]
    plain = host.advance

    def too_long(admissions, slots, tokens):
        if any(mark in prompt for admission in admissions for prompt in admission.prompts.values()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(admissions, slots, tokens)

    host.advance = too_long
    records, _ = replica.decode(nothing, [ROWS[0], ask("large", "!"), *ROWS[1:]])
    assert "no memory" in records.pop("large").error
    assert records == reference


def positioned(tiny):
    replica = Replica(tiny, slots=2)
    host = replica.loaded["arm"]
    (role,) = host._roles
    return PositionedHost(host), host, [Admission(0, {role.name: [1, 2, 3]})]


def test_a_repeated_step_gives_the_same_answer_without_computing_again(tiny):
    host, plain, admissions = positioned(tiny)
    at = Position(0, 77, 0)
    host.advance(at, Step(admissions))
    host.advance(at.after, Step(slots=[0], tokens=[5]))
    first, forwards = host.logprobs_at(at.after, [0], None), plain.num_forwards
    host.advance(at.after, Step(slots=[0], tokens=[5]))
    assert torch.equal(host.logprobs_at(at.after, [0], None), first)
    assert plain.num_forwards == forwards


def test_a_repeated_step_of_a_lone_host_draws_the_same_token_and_goes_on_from_it(tiny):
    replica = Replica(tiny, slots=2, runs_ahead=True)
    host = replica.hosts(nothing)["base"].inner.host
    prompts = {role.name: [1, 2, 3] for role in replica.plans["base"].roles}
    terms = [Terms(RuleName.EQUILIBRIUM, 0.5, (0.7,))]
    at = Position(0, 77, 0)
    host.advance_and_sample(at, Step([Admission(0, prompts)]), [0], terms, [0.3])
    later = [host.advance_and_sample(at.after, Step((), [0], [DRAWN]), [0], terms, [0.6]) for _ in range(3)]
    assert later[0] == later[1] == later[2]
    other = host.advance_and_sample(Position(1, 77, 0), Step([Admission(1, prompts)]), [1], terms, [0.3])
    [token] = [outcome.token_id for outcome in other]
    assert host.advance_and_sample(Position(1, 77, 1), Step((), [1], [token]), [1], terms, [0.6]) == later[0]
    host.resize(2)
    with pytest.raises(StateLost):
        host.advance_and_sample(at.after.after, Step((), [0], [DRAWN]), [0], terms, [0.6])


@pytest.mark.parametrize("wrong", [Position(0, 77, 0), Position(0, 77, 2), Position(0, 78, 1), Position(1, 77, 1)])
def test_a_host_elsewhere_refuses_to_answer_and_to_go_on(tiny, wrong):
    host, _, admissions = positioned(tiny)
    at = Position(0, 77, 0)
    host.advance(at, Step(admissions))
    host.advance(at.after, Step(slots=[0], tokens=[5]))
    with pytest.raises(StateLost):
        host.propose(wrong, [0], num_candidates=3, min_p=0)
    with pytest.raises(StateLost):
        host.logprobs_at(wrong, [0], None)
    with pytest.raises(StateLost):
        host.advance(Position(wrong.group, wrong.epoch, wrong.step + 3), Step(slots=[0], tokens=[5]))


def test_a_call_that_fails_half_way_leaves_no_state_to_go_on_from(tiny):
    host, plain, admissions = positioned(tiny)
    at = Position(0, 77, 0)
    host.advance(at, Step(admissions))
    plain.advance = lambda *_: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(HostOutOfMemory):
        host.advance(at.after, Step(slots=[0], tokens=[5]))
    del plain.advance
    for step in (at, at.after):
        with pytest.raises(StateLost):
            host.logprobs_at(step, [0], None)


def test_a_host_gives_its_values_before_it_begins_the_next_groups_step(tiny):
    """Otherwise they wait behind a forward pass, and the games are hidden behind nothing."""
    calls = []
    Replica(tiny, num_groups=2).decode(
        lambda host, _, method, args: calls.append((host.inner._plan.name, method, args))
    )
    calls = [(name, method, args[0]) for name, method, args in calls if method != "score"]
    on_base = [(method, at) for name, method, at in calls if name == "base"]
    on_other = [(method, at) for name, method, at in calls if name != "base"]
    assert {method for method, _ in on_base} == {"advance_and_propose"}
    assert {at.group for _, at in on_base} == {0, 1}
    assert [method for method, _ in on_other] == ["advance", "logprobs_at"] * len(on_base)
    assert [at for _, at in on_other[::2]] == [at for _, at in on_other[1::2]] == [at for _, at in on_base]


def test_a_lone_host_is_sent_steps_before_their_tokens_are_there(tiny):
    """What it draws and what comes out are the same, also of rows that end when a step more was sent."""
    replica = Replica(tiny, runs_ahead=True, stop=string.printable)
    expected, engine = replica.decode(nothing)
    assert {record.finish_reason for record in expected.values()} == {"stop", "length"}
    replica.options["runs_ahead"] = False
    waiting, other = replica.decode(nothing)
    assert waiting == expected
    assert engine.num_row_steps == other.num_row_steps == sum(record.num_tokens for record in expected.values())
    replica.options["runs_ahead"], sent = True, []
    replica.decode(lambda host, number, method, args: sent.extend(args[1].tokens if method != "score" else []))
    assert set(sent) == {DRAWN}
    assert len(sent) > engine.num_row_steps - len(expected)
