"""Runs a language model the plain way: every (slot, role) has transformers' own cache, and a pass is one row.

It is right for every causal language model that transformers can generate with, whatever its layers keep: keys,
states of linear attention, convolutions. And a row's bits are its own, as no other row is ever in a pass. The price
is one pass per row and role where `LanguageModelRunner` has one for all. Every faster way is tested against it.

R roles of the host, B rows of a call, K candidates, V vocabulary, T tokens.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.utils import ALL_CACHE_NAMES

from pipeline.attention.cached_layers import MODULE_STATES
from pipeline.attention.prefixes import Prompt
from pipeline.protocol.memory import PassSizes, memory_of_host
from pipeline.protocol.messages import DRAWN, Admission, Candidates, MemoryBudget, Step
from pipeline.protocol.topology import HostRole
from pipeline.worker.adapters import TokenAdapters
from pipeline.worker.layer_devices import devices_of
from pipeline.worker.memory import budget_of, pass_sizes
from pipeline.worker.newest_logits import NewestLogits, answer_logprobs


@dataclass(slots=True)
class PlainRow:
    """A text and what the model keeps of it.

    Args:
        ids: the text so far, [1, T].
        inputs: what `generate` carries from pass to pass, the cache among it.
        states: of modules that keep the state of a text themselves.
        preference: of its adapter, where that depends on one; see `TokenAdapters.preference`.
    """

    ids: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)
    states: list[Any] = field(default_factory=list)
    preference: Sequence[float] | None = None

    def fork(self) -> PlainRow:
        """Another row that goes on from the same text."""
        return PlainRow(self.ids, copy.deepcopy(self.inputs), copy.deepcopy(self.states), self.preference)

    @property
    def num_bytes(self) -> Counter[torch.device]:
        """Bytes of what the model keeps, by device."""
        kept = [value for name, value in self.inputs.items() if name in ALL_CACHE_NAMES]
        found: Counter[torch.device] = Counter()
        for each in _tensors_in([*kept, self.states]):
            found[each.device] += each.untyped_storage().nbytes()
        return found


class PlainPasses:
    """Runs a model over one row at a time, with inputs that are prepared as the model's own `generate` prepares them.

    Args:
        model: a causal LM in eval mode with an attention of its own choice.
        adapters: of the model, where it has some.

    Attributes:
        device: of the model.
        num_forwards: passes so far.
        num_tokens: tokens that went through them.
        forward_s: seconds that they took.
    """

    def __init__(self, model: Any, adapters: TokenAdapters | None = None) -> None:
        self._model = model
        self._adapters = adapters
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._states = [
            (module, name) for module in model.modules() for name in MODULE_STATES if name in vars(module)
        ]
        self.devices = devices_of(model)
        self.device = self.devices[0]
        self.num_forwards = self.num_tokens = 0
        self.forward_s = 0.0

    def sizes(self, vocab_size: int) -> PassSizes:
        """What a pass takes, with so many logits kept."""
        return pass_sizes(self._model, vocab_size)

    def begin(
        self, tokens: Sequence[int], adapter: str | None, preference: Sequence[float] | None = None
    ) -> tuple[PlainRow, Tensor]:
        """Read a prompt: its row, and the logits [V] after it."""
        model = self._model
        ids = torch.tensor([list(tokens)], device=self.device)
        inputs: dict[str, Any] = {"use_cache": True, "attention_mask": torch.ones_like(ids)}
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(len(tokens), device=self.device)[None]
            inputs["position_ids"] = model._prepare_position_ids_for_generation(ids, inputs)
        if model._supports_default_dynamic_cache():
            name = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
            inputs[name] = DynamicCache(config=model.config.get_text_config(decoder=True))
        row = PlainRow(ids, inputs, [None] * len(self._states), preference)
        return row, self._run(row, adapter, num_new=None)

    def append(self, row: PlainRow, token: int, adapter: str | None) -> Tensor:
        """Read one token more: the logits [V] after it."""
        row.ids = torch.cat([row.ids, torch.tensor([[token]], device=self.device)], 1)
        return self._run(row, adapter, num_new=1 if row.inputs["use_cache"] else None)

    def read(self, tokens: Sequence[int], adapter: str | None, preference: Sequence[float] | None = None) -> Tensor:
        """The logits [T, V] of a text in one plain forward pass, which leaves nothing behind."""
        self._use(adapter, len(tokens), preference)
        started_s = time.perf_counter()
        logits: Tensor = self._model(input_ids=torch.tensor([list(tokens)], device=self.device)).logits[0]
        self._count(len(tokens), started_s)
        return logits.float()

    @torch.inference_mode()
    def _run(self, row: PlainRow, adapter: str | None, *, num_new: int | None) -> Tensor:
        model = self._model
        others = [getattr(module, name) for module, name in self._states]  # of who else runs the model
        self._set_states(row.states)
        inputs = model.prepare_inputs_for_generation(
            row.ids, next_sequence_length=num_new, is_first_iteration=num_new is None, **row.inputs
        )
        read = inputs.get("input_ids")
        num_tokens = int((row.ids if read is None else read).shape[1])
        self._use(adapter, num_tokens, row.preference)
        started_s = time.perf_counter()
        output = model(**inputs, return_dict=True)
        row.inputs = model._update_model_kwargs_for_generation(output, row.inputs, is_encoder_decoder=False)
        row.states = [getattr(module, name) for module, name in self._states]
        self._set_states(others)
        self._count(num_tokens, started_s)
        logits: Tensor = output.logits[0, -1]
        return logits.float()

    def _set_states(self, states: Sequence[Any]) -> None:
        for (module, name), state in zip(self._states, states, strict=True):
            setattr(module, name, state)

    def preference(self, role: HostRole, weights: Sequence[float]) -> list[float] | None:
        """At which preferences the adapter of a role is used by a row of these weights; None: at none."""
        return None if self._adapters is None else self._adapters.preference(role, weights)

    def _use(self, adapter: str | None, num_tokens: int, preference: Sequence[float] | None) -> None:
        """Have all tokens of the next pass use one adapter."""
        if self._adapters is not None:
            number = self._adapters.number(adapter)
            self._adapters.of_tokens = torch.full((num_tokens,), number, device=self.device)
            self._adapters.preferences = None
            if preference is not None:
                row = torch.tensor(preference, device=self.device, dtype=self._model.dtype)
                self._adapters.preferences = row.expand(num_tokens, -1)

    def _count(self, num_tokens: int, started_s: float) -> None:
        self.num_forwards += 1
        self.num_tokens += num_tokens
        self.forward_s += time.perf_counter() - started_s


class PlainRunner:
    """Runs one model for `num_slots` rows and several roles, one row at a time (`LanguageRunner`).

    Args:
        passes: the model.
        roles: what it serves. The first is the base's, where the host is the base's.
        num_slots: rows at once.
        vocab_size: number of token ids that all models share; logits beyond it are cut.
        reads_whole: whether one forward pass over a text gives the logits of its steps; otherwise existing answers
            are scored token by token.
        exact_context: tokens behind which keys are computed in another way (longrope); None: there is no such place.
            An answer that crosses it is scored token by token.
        bytes_per_token: what one token of one row takes, as far as it grows with the text, by device.
    """

    def __init__(
        self,
        passes: PlainPasses,
        roles: Sequence[HostRole],
        *,
        num_slots: int,
        vocab_size: int,
        reads_whole: bool = True,
        exact_context: int | None = None,
        bytes_per_token: Mapping[torch.device, int] = MappingProxyType({}),
    ) -> None:
        self._passes = passes
        self._roles = tuple(roles)
        self._vocab_size = vocab_size
        self._reads_whole = reads_whole
        self._exact_context = exact_context
        self._bytes_per_token = bytes_per_token
        self._lay_out(num_slots)

    def _lay_out(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._rows: dict[tuple[int, int], PlainRow] = {}
        self._logits = NewestLogits(len(self._roles), num_slots, self._vocab_size, self.device)
        self.newest_S = torch.zeros(num_slots, dtype=torch.long, device=self.device)
        # the newest prompt of each role, as it was read: other answers to it continue from a copy
        self._newest: dict[int, tuple[Prompt, PlainRow, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._passes.device

    @property
    def work(self) -> tuple[int, int, float]:
        """Passes so far, tokens that went through them, and the seconds that they took."""
        return self._passes.num_forwards, self._passes.num_tokens, self._passes.forward_s

    @property
    def cache_bytes(self) -> int:
        """Bytes that its rows take in memory."""
        rows = [*self._rows.values(), *(newest[1] for newest in self._newest.values())]
        return sum(row.num_bytes.total() for row in rows)

    def memory_budget(self, row_tokens: int) -> MemoryBudget:
        """What a slot takes with rows of so many tokens, and what is free."""
        memory_of = partial(
            memory_of_host,
            self._passes.sizes(self._vocab_size),
            num_roles=len(self._roles),
            row_tokens=row_tokens,
        )
        return budget_of(self._passes.devices, memory_of, bytes_per_token=self._bytes_per_token)

    def resize(self, num_slots: int) -> None:
        """Forget all rows and hold `num_slots` at once from now on."""
        self._rows.clear()
        self._newest.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._lay_out(num_slots)

    @torch.inference_mode()
    def advance(self, step: Step) -> None:
        """Read new rows' prompts, each with its last part, and append one token to each running row."""
        for admission in step.admissions:
            if admission.is_last:
                for index, role in enumerate(self._roles):
                    self._begin(index, role, admission)
        drawn = self.newest_S.tolist() if DRAWN in step.tokens else []
        for slot, token in zip(step.slots, step.tokens, strict=True):
            for index, role in enumerate(self._roles):
                given = drawn[slot] if token == DRAWN else token
                logits_V = self._passes.append(self._rows[index, slot], given, role.adapter)
                self._logits.put(index * self._num_slots + slot, logits_V[: self._vocab_size])

    @torch.inference_mode()
    def propose(self, slots: Sequence[int], *, num_candidates: int | None, min_p: float) -> Candidates:
        """The base role's candidates for each slot, most likely first; None proposes the whole vocabulary."""
        return self._logits.propose(slots, num_candidates=num_candidates, min_p=min_p)

    @torch.inference_mode()
    def logprobs_at(self, slots: Sequence[int], ids_BK: Tensor | None) -> Tensor:
        """Log-probabilities [B, R, K] in nats of every role at the candidates."""
        return self._logits.logprobs_at(slots, ids_BK)

    @torch.inference_mode()
    def score(
        self, prompts: Mapping[str, Sequence[int]], answer: Sequence[int], weights: Sequence[float] = ()
    ) -> Tensor:
        """Teacher forcing: log-probabilities [R, T] of the answer's tokens under each role."""
        scores = []
        for role in self._roles:
            logits_TV = self._logits_of_answer(prompts[role.name], answer, role, weights)[:, : self._vocab_size]
            scores.append(answer_logprobs(logits_TV, answer))
        return torch.stack(scores)

    def _logits_of_answer(
        self, prompt: Sequence[int], answer: Sequence[int], role: HostRole, weights: Sequence[float]
    ) -> Tensor:
        """The logits [T, V] from which each token of the answer would be drawn."""
        adapter, preference = role.adapter, self._passes.preference(role, weights)
        limit = self._exact_context
        crosses = limit is not None and len(prompt) <= limit < len(prompt) + len(answer) - 1
        if self._reads_whole and not crosses:
            return self._passes.read([*prompt, *answer[:-1]], adapter, preference)[len(prompt) - 1 :]
        row, logits_V = self._passes.begin(prompt, adapter, preference)
        steps = [logits_V]
        for token in answer[:-1]:
            steps.append(self._passes.append(row, token, adapter))
        return torch.stack(steps)

    def _begin(self, index: int, role: HostRole, admission: Admission) -> None:
        """Read a prompt, or go on from where another answer to the same prompt has read it."""
        prompt = Prompt.of(
            role.adapter,
            [*admission.prompts[role.name], *admission.answer],
            0,
            weights=admission.weights if role.takes_weights else (),
        )
        if index not in self._newest or self._newest[index][0] != prompt:
            preference = self._passes.preference(role, admission.weights)
            self._newest[index] = (prompt, *self._passes.begin(prompt.tokens, role.adapter, preference))
        _, row, logits_V = self._newest[index]
        self._rows[index, admission.slot] = row.fork()
        self._logits.put(index * self._num_slots + admission.slot, logits_V[: self._vocab_size])


def _tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that is held by lists, mappings and objects, once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    parts: Any = ()
    if isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, Mapping):
        parts = value.values()
    elif hasattr(value, "__dict__"):
        parts = vars(value).values()
    for part in parts:
        yield from _tensors_in(part, seen)
