"""Hosts whose model is a table: the logits of a role are a hash of the tokens that it has read."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.model_drafts import Asked, ModelDrafts
from pipeline.engine.prompter import NOTHING
from pipeline.errors import ConfigurationError, RowError
from pipeline.protocol.drafts import DraftRequest, Proposed
from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import (
    DRAWN,
    Candidates,
    MemoryBudget,
    Position,
    Step,
    Terms,
    TokenOutcome,
    most_drafted,
)
from pipeline.protocol.specs import GameSpec, HostSpec, SamplingOptions
from pipeline.protocol.topology import BASE, Role
from pipeline.records import Message, Row, Tool
from pipeline.sampling.games import SampledStep, solve_and_sample
from pipeline.worker.hosts import LanguageModelHost, PositionGuard
from pipeline.worker.sampling_host import SamplingHost
from simulation.threads import Current

VOCAB = 6
END = 0
PASS_S = 0.02
POISON = "poison"

_tables: dict[int, list[float]] = {}


def logprobs(state: int) -> list[float]:
    """Log-probabilities of all tokens after what hashes to `state`."""
    if state not in _tables:
        logits = [((state >> (5 * token)) & 31) / 12 for token in range(VOCAB)]
        total = math.log(sum(map(math.exp, logits)))
        _tables[state] = [logit - total for logit in logits]
    return _tables[state]


@functools.lru_cache(maxsize=4096)
def _candidates(states: tuple[tuple[int, ...], ...], count: int | None) -> Candidates:
    """What a host proposes where its roles have read `states`, by row."""
    ids, base, covered, others = [], [], [], []
    for roles in [[logprobs(state) for state in row] for row in states]:
        order = sorted(range(VOCAB), key=lambda token: (-roles[0][token], token))[:count]
        ids.append(order)
        base.append([roles[0][token] for token in order])
        covered.append(sum(map(math.exp, base[-1])))
        others.append([[role[token] for token in order] for role in roles])
    return Candidates(
        torch.tensor(ids),
        torch.tensor(base, dtype=torch.float64),
        torch.tensor(covered, dtype=torch.float64),
        torch.tensor(others, dtype=torch.float64),
    )


@functools.lru_cache(maxsize=4096)
def _outputs(states: tuple[tuple[int, ...], ...], ids: tuple[tuple[int, ...], ...]) -> Tensor:
    """What roles that have read `states` say of the candidates, by row."""
    rows = zip(states, ids, strict=True)
    numbers = [[[logprobs(state)[token] for token in id_K] for state in row] for row, id_K in rows]
    return torch.tensor(numbers, dtype=torch.float64)


class TableRunner:
    """A language model (`LanguageRunner`) that is a table.

    Args:
        spec: of its host.
        salt: another machine kind gives other bits.
    """

    device = torch.device("cpu")

    def __init__(self, spec: HostSpec, salt: int) -> None:
        self._roles = [role.name for role in spec.roles]
        self._salt = salt
        self._states: dict[int, list[int]] = {}
        self._lanes: dict[int, Sequence[int]] = {}  # by slot, those of its draft in the last step
        self.newest_S: Any = Newest(spec.num_slots)

    def forget(self) -> None:
        """Know no row any more, as a process that was restarted."""
        self._states.clear()

    def advance(self, step: Step) -> None:
        world, task = Current.world, Current.task()
        world.pause(PASS_S)
        Current.inject.host_call(task.process)
        for slot, token in zip(step.slots, step.tokens, strict=True):
            token = self.newest_S[slot] if token == DRAWN else token
            if accepted := step.accepted.get(slot):
                self._states[slot] = self._states[self._lanes[slot][accepted - 1]]
            self._states[slot] = _after(self._states[slot], token)
        for admission in step.admissions:
            states = []
            for role in self._roles:
                tokens = (*admission.prompts[role], *admission.answer)
                states.append(_read(role, self._salt, tokens))
                if POISON_TOKEN in tokens and Current.inject.has("a row kills its host"):
                    task.process.kill()
            self._states[admission.slot] = states
        for draft in step.drafts:
            states = self._states[draft.slot]
            for token, lane in zip(draft.tokens, draft.lanes, strict=True):
                states = self._states[lane] = _after(states, token)
            self._lanes[draft.slot] = draft.lanes

    def _of(self, slots: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self._states[slot]) for slot in slots)

    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        Current.world.pause(PASS_S / 4)
        return _candidates(self._of(slots), num_candidates)

    def logprobs_at(self, slots: Sequence[int], ids_BK: Tensor | None) -> Tensor:
        Current.world.pause(PASS_S / 4)
        assert ids_BK is not None
        return _outputs(self._of(slots), tuple(map(tuple, ids_BK.tolist())))

    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        raise RowError("a table scores no existing answers")

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        return MemoryBudget("here", "cpu", 1, 1000, verifies_drafts=True)

    def resize(self, num_slots: int) -> None:
        Current.world.pause(PASS_S / 4)
        self._states.clear()
        self.newest_S = Newest(num_slots)

    @property
    def work(self) -> tuple[int, int, float]:
        return 0, 0, 0.0

    cache_bytes = 0


class Newest:
    """The newest token of each slot (`LanguageRunner.newest_S`): as much of a tensor as is used."""

    device = torch.device("cpu")

    def __init__(self, num_slots: int) -> None:
        self._tokens = [0] * (num_slots + most_drafted(num_slots))

    def __getitem__(self, slot: int) -> int:
        return self._tokens[slot]

    def __setitem__(self, slots: Sequence[int], tokens: Tensor) -> None:
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            self._tokens[slot] = token


@functools.lru_cache(maxsize=4096)
def _read(role: str, salt: int, tokens: tuple[int, ...]) -> int:
    """What a role has read, as one number."""
    return functools.reduce(
        lambda state, token: _after([state], token)[0], tokens, zlib.crc32(f"{role} {salt}".encode())
    )


def _after(states: Sequence[int], token: int) -> list[int]:
    """What the roles have read when a token follows."""
    return [zlib.crc32(b"%d" % token, state) for state in states]


class TableDraftModel:
    """A model that proposes tokens (`DraftingModel`): it draws from the base's table, so it is right now and then."""

    def propose(self, requests: Sequence[DraftRequest]) -> list[Proposed | None]:
        Current.world.pause(PASS_S / 4)
        return [self._draw(each) for each in requests]

    def _draw(self, request: DraftRequest) -> Proposed:
        chances = [math.exp(logprob) for logprob in logprobs(_read(BASE, 0, tuple(request.text)))]
        likeliest = sorted(range(VOCAB), key=lambda token: -chances[token])
        left = request.uniform
        for token in likeliest:
            left -= chances[token]
            if left <= 0:
                return Proposed(token, chances[token])
        return Proposed(likeliest[-1], chances[likeliest[-1]])

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        return MemoryBudget("here", "cpu", 1, 1000)

    def resize(self, num_slots: int) -> None:
        pass


def ask_about_all(
    drafts: ModelDrafts, ranked: Sequence[Asked], expected: float, num_positions: int, wait_s: float
) -> int:
    """In place of what passes cost: the model is asked whenever it may be."""
    return len(ranked)


class Forgetful:
    """A host that may lose its state between two calls."""

    _runner: TableRunner
    _guard: PositionGuard

    def advance(self, at: Position, step: Step) -> None:
        if Current.inject.host_forgets():
            self._runner.forget()
            self._guard.forget()
        super().advance(at, step)  # type: ignore[misc]


class TableHost(Forgetful, LanguageModelHost):
    """A host that proposes or scores."""


class TableSamplingHost(Forgetful, SamplingHost):
    """A host that samples."""


class LateSamplingHost(TableSamplingHost):
    """A host whose outcomes come later than its answer, as those of a GPU do."""

    def advance_and_sample(
        self, at: Position, step: Step, slots: Sequence[int], terms: Sequence[Terms], uniforms: Sequence[float]
    ) -> Reply[list[TokenOutcome]]:
        outcomes = super().advance_and_sample(at, step, slots, terms, uniforms).result()

        def wait() -> list[TokenOutcome]:
            Current.world.pause(PASS_S / 2)
            return outcomes

        return Reply(wait)


def _runner(spec: HostSpec) -> TableRunner:
    Current.world.pause(1.0)
    if Current.inject.has("hosts never load"):
        raise RuntimeError("the weights' file ends before it should")
    salt = 1 if Current.task().process.driver.name != "d1" and Current.inject.has("other bits") else 0
    return TableRunner(spec, salt)


def start_scoring(spec: HostSpec) -> TableHost:
    return TableHost(_runner(spec))


start_proposing = start_scoring


def start_drafting(spec: HostSpec, sampling: SamplingOptions) -> TableDraftModel:
    Current.world.pause(0.5)
    return TableDraftModel()


def start_sampling(spec: HostSpec, games: GameSpec) -> TableSamplingHost:
    kind = LateSamplingHost if Current.is_late else TableSamplingHost
    return kind(_runner(spec), spec.roles, games)


class TablePrompter:
    """What the engine asks of prompts (`Prompter`), for a vocabulary of six tokens."""

    stop_ids = frozenset((END,))

    def __init__(self, roles: Mapping[str, Role]) -> None:
        self._roles = roles
        self._encoded: dict[str, Mapping[str, Sequence[int]]] = {}

    def encode(
        self,
        messages: Sequence[Message],
        weights: Mapping[str, float],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] = NOTHING,
    ) -> Mapping[str, Sequence[int]]:
        text = messages[-1]["content"]
        if text not in self._encoded:
            tokens = [1 + ord(char) % (VOCAB - 1) for char in text]
            tokens += [POISON_TOKEN] if text.startswith(POISON) else []
            self._encoded[text] = {name: [len(role.principle or ""), *tokens] for name, role in self._roles.items()}
        return self._encoded[text]

    def shared_prefixes(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> dict[str, int]:
        return {}

    def context_left(self, prompts: Mapping[str, Sequence[int]]) -> int | None:
        return None

    def encode_answer(self, text: str) -> Sequence[int]:
        raise ConfigurationError("the rows have no answers")

    def kwargs_of(self, row: Row) -> Mapping[str, Any]:
        return NOTHING

    def encode_existing(self, row: Row, prompts: Mapping[str, Sequence[int]]) -> tuple[Sequence[int], int]:
        raise ConfigurationError("the rows have no answers")

    def begin_turn(self, messages: Sequence[Message], prompts: Mapping[str, Sequence[int]]) -> None:
        return None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(" abcdef"[token] for token in ids)

    raw_text = decode

    def left_out(self, ids: Sequence[int]) -> str:
        return ""

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])


POISON_TOKEN = 999

_solved: dict[tuple[Any, ...], list[float]] = {}
_steps: dict[tuple[tuple[Any, ...], ...], SampledStep] = {}


def solve_once(
    options: Any,
    proposal: Candidates,
    rewards: Sequence[Tensor],
    terms: Sequence[Terms],
    uniforms: Sequence[float],
    at_weights: Tensor | None = None,
) -> SampledStep:
    """`solve_and_sample`, which solves each game once in the life of the process: a row's bits are its own."""
    assert at_weights is None
    assert proposal.ids_BK is not None
    numbers = [each.numpy() for each in (proposal.base_logprobs_BK, torch.stack([*rewards], 1), proposal.ids_BK)]
    keys = tuple(
        (*(each[row].tobytes() for each in numbers), terms[row].rule, terms[row].weights, uniforms[row])
        for row in range(len(terms))
    )
    if keys in _steps:
        return _steps[keys]
    for row, key in enumerate(keys):
        if key not in _solved:
            one = [reward[row : row + 1] for reward in rewards]
            solved = solve_and_sample(options, proposal.rows([row]), one, [terms[row]], [uniforms[row]])
            _solved[key] = solved.numbers_BC[0].tolist()
    step = _steps[keys] = SampledStep(torch.tensor([_solved[key] for key in keys], dtype=torch.float64))
    return step
