"""Replicas in this process whose hosts fail as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.drafting import Drafter
from pipeline.engine.engine import Engine
from pipeline.engine.pace import Pace
from pipeline.engine.row_state import RunningRow
from pipeline.errors import HostError, HostOutOfMemory
from pipeline.protocol.hosts import Hosts, Reply
from pipeline.records import Record, Row
from pipeline.runtime.assembly import assemble
from pipeline.runtime.local_hosts import LocalHost, LocalProposingHost, LocalSamplingHost
from pipeline.worker.hosts import LanguageModelHost
from pipeline.worker.language_model_runner import LanguageModelRunner
from pipeline.worker.loading import load_language_model
from pipeline.worker.sampling_host import SamplingHost
from pipeline.worker.start import start_drafting
from support.decoding import NOWHERE, ask, config_of

ROWS = [ask(f"r{at}", "x" * (3 * at % 7 + 1), response="fine" if at % 2 else None) for at in range(5)]
PRINCIPALS = {"kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7}}


class FreePace(Pace):
    """Passes that take the same time whatever they verify: so every proposal is."""

    def gain(self, tokens: float, num_more: float, expected: float, num_positions: int, **_: float) -> float:
        return tokens

    def begins_probe(self) -> bool:
        return False


# Called with a client, the number of its call, the message and its arguments; a reply that it returns is the call's.
Before = Callable[["Unreliable", int, str, Sequence[Any]], Reply[Any] | None]


class Unreliable:
    """The client of a host that does something before each of its calls.

    Args:
        name: of the host.
        inner: the client that calls are passed on to.
        runner: the host's model.
        before: is called first.
    """

    def __init__(self, name: str, inner: Any, runner: LanguageModelRunner, before: Before) -> None:
        self.name, self.inner, self.runner, self.before, self.calls = name, inner, runner, before, 0

    def __getattr__(self, method: str) -> Callable[..., Any]:
        call = getattr(self.inner, method)

        def run(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return self.before(self, self.calls, method, args) or call(*args, **options)

        return run

    def forget(self) -> None:
        """What a new process would know: nothing."""
        self.inner.host.resize(self.runner.num_slots)


def failed(message: str) -> Reply[Any]:
    """A reply of a host that died."""

    def wait() -> Any:
        raise HostError(message)

    return Reply(wait)


@dataclass
class FailsOrForgets:
    """At the call of this number a host dies, where the number is odd, or forgets its rows; once."""

    moment: int
    is_over: bool = False

    def __call__(self, host: Any, number: int, method: str, args: Any) -> Reply[Any] | None:
        if number != self.moment or self.is_over:
            return None
        self.is_over = True
        if self.moment % 2:
            return failed("a host died")
        host.forget()
        return None


@dataclass
class LacksMemoryForDrafts:
    """The first pass that verifies drafts finds no memory."""

    is_over: bool = False

    def __call__(self, host: Any, number: int, method: str, args: Any) -> Reply[Any] | None:
        if method != "advance_and_propose" or not args[1].drafts or self.is_over:
            return None
        self.is_over = True

        def wait() -> Any:
            raise HostOutOfMemory("out of memory")

        return Reply(wait)


class Replica:
    """An engine whose hosts run `before`; the models are loaded once.

    One that runs ahead has a lone host, which samples; others have a second host. With `drafts`, passes verify
    tokens wherever any are proposed, also by `draft_model` where there is one.
    """

    def __init__(
        self,
        tiny: Callable[..., Path],
        *,
        slots: int = 3,
        num_groups: int = 1,
        runs_ahead: bool = False,
        reproducibility: str = "strict",
        max_failures: int = 20,
        stop: Iterable[str] = (),
        drafts: bool = False,
        max_new_tokens: int = 4,
        draft_model: Path | None = None,
    ) -> None:
        arm = {"kind": "arm", "model": str(tiny(seed=5)), "reference": "none", "weight": 0.1}
        self.config = config_of(
            tiny(),
            PRINCIPALS if runs_ahead else {**PRINCIPALS, "arm": arm},
            decoding={
                "max_new_tokens": max_new_tokens,
                "draft": "auto" if drafts else "off",
                "agent_temperature": 0.5,
                "trace": "tokens",
                "reproducibility": reproducibility,
                "stop": list(stop),
                "draft_model": None if draft_model is None else str(draft_model),
            },
            cluster={"slots": slots},
        )
        self.runs_ahead, self.drafts = runs_ahead, drafts
        self.options = {"num_slots": slots, "num_groups": num_groups, "max_failures": max_failures}
        self.assembly = assemble(self.config, NOWHERE)
        self.draft_model = None
        if (spec := self.assembly.draft) is not None:
            self.draft_model = start_drafting(spec, self.config.decoding.sampling)
        self.plans = {plan.name: plan for plan in self.assembly.topology.hosts}
        self.runners = {spec.name: load_language_model(spec).runner for spec in self.assembly.hosts}

    def hosts(self, before: Before) -> Hosts:
        """New hosts, as started processes would be, around the loaded models."""
        for runner in self.runners.values():
            runner.resize(self.options["num_slots"])
        spec, runner, plan = self.assembly.hosts[0], self.runners["base"], self.plans["base"]
        if spec.games is not None:
            client = LocalSamplingHost(SamplingHost(runner, spec.roles, spec.games), plan)
            return Hosts.lone(Unreliable("base", client, runner, before), runs_ahead=self.runs_ahead)
        base = Unreliable("base", LocalProposingHost(LanguageModelHost(runner), plan), runner, before)
        other = LocalHost(LanguageModelHost(self.runners["arm"]), self.plans["arm"])
        return Hosts(base, (Unreliable("arm", other, self.runners["arm"], before),))

    def _existing(self, running: RunningRow) -> Sequence[int]:
        return self.assembly.prompter.encode_existing(running.row, running.prompts)[0]

    def decode(self, before: Before, rows: Iterable[Row] = ROWS) -> tuple[dict[str, Record], Engine]:
        """Records by id, and the engine; hosts that fail are replaced."""
        hosts = self.hosts(before)
        assembly = self.assembly
        drafter = None
        if self.drafts:
            drafter = Drafter(self.config.draft_sources, self._existing, FreePace(), model=self.draft_model)
        engine = Engine(
            assembly.topology,
            hosts,
            assembly.prompter,
            self.config.decoding,
            assembly.variants,
            **self.options,
            drafter=drafter,
        )
        records: dict[str, Record] = {}
        waiting = list(rows)
        while waiting or not engine.is_idle:
            while engine.wants_row and waiting:
                engine.admit(waiting.pop(0))
            try:
                found = engine.step()
            except HostError as error:
                engine.recover(self.hosts(before), error)
                continue
            assert not records.keys() & {record.row_id for record in found}
            records |= {record.row_id: record for record in found}
        return records, engine


def nothing(*_: Any) -> None:
    """Let every call pass."""
