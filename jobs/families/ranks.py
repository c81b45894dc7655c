"""What a family's tiny model shows when two ranks share its layers: the same answers as one process, or a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from jobs.families.configurations import model_class
from pipeline.errors import CageError
from pipeline.hub.parallel_plans import why_not_divided
from pipeline.protocol.messages import Admission, Position, Step
from pipeline.protocol.specs import HostSpec
from pipeline.protocol.topology import HostPlan
from pipeline.runtime.rank_groups import RankGroupHost
from pipeline.runtime.wiring import unwrapped
from pipeline.sections import ModelConfig

NUM_RANKS = 2
MOST_LOADED = 10  # models by one pair of processes
NUM_NEW = 6  # tokens of each answer
LEAST_SHARE = 0.5  # of the layers' weights that must be split for it to be worth the ranks
TIMEOUT_S = 120.0
TOLERANCE = 1e-3  # nats

# the numbers of some prompts, and of tokens, to greedy answers and each one's last log-probabilities [V]
Expected = Callable[[Sequence[int], int], tuple[list[list[int]], list[Tensor]]]


class RankPair:
    """Two ranks, which load one tiny model after another. Use it as a context manager."""

    def __init__(self) -> None:
        self._group: RankGroupHost | None = None
        self._num_loaded = 0
        self._epochs = count()

    def __enter__(self) -> RankPair:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._group is not None:
            self._group.close()

    def why_not(self, name: str, spec: HostSpec, prompts: Sequence[Sequence[int]], expected: Expected) -> str | None:
        """Why two ranks cannot serve a family; None: they can.

        Args:
            name: of the family.
            spec: of its tiny model, in one process and in strict mode.
            prompts: token ids.
            expected: gives what one process answers.
        """
        model = model_class(name).from_pretrained(spec.source.path)
        if (reason := why_no_split(model)) is not None:
            return reason
        if (reason := why_not_divided(model.config.get_text_config(decoder=True).to_dict(), NUM_RANKS)) is not None:
            return reason.partition(" be divided")[0] + " be divided"
        try:
            together, bits = self._answers(spec, prompts, range(len(prompts)))
            wanted, logprobs = expected(range(len(prompts)), NUM_NEW)
            if together != wanted:
                return "two ranks decode it otherwise than one process"
            # the token that ends an answer is left out of both
            pairs = zip(bits, logprobs, strict=True)
            difference = max(float((one[1:] - other[1:]).abs().max()) for one, other in pairs)
            if not difference <= TOLERANCE:
                return f"two ranks' log-probabilities differ from one process's by {difference:.2g} nats"
            _, alone = self._answers(spec, prompts, [0])
        except CageError as error:
            return f"two ranks cannot run it: {_reason(error)}"
        return None if torch.equal(alone[0], bits[0]) else "with two ranks a row's bits depend on the rows beside it"

    def _answers(
        self, spec: HostSpec, prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> tuple[list[list[int]], list[Tensor]]:
        """Greedy answers of some prompts in one batch, and the log-probabilities [V] of each one's last token."""
        host = self._loaded(replace(spec, tensor_parallel=NUM_RANKS), len(rows))
        role, slots = spec.roles[0].name, list(range(len(rows)))
        at = Position(0, next(self._epochs), 0)
        host.advance(at, Step([Admission(slot, {role: prompts[row]}) for slot, row in enumerate(rows)])).result()
        answers: list[list[int]] = [[] for _ in rows]
        for step in range(NUM_NEW):
            if step:
                at = at.after
                host.advance(at, Step((), slots, [answer[-1] for answer in answers])).result()
            logprobs_BV = host.values_at(at, slots, [step] * len(rows), None).result()[:, 0]
            logprobs_BV = logprobs_BV.index_fill(1, torch.tensor([0]), -torch.inf)  # no answer ends
            for answer, token in zip(answers, logprobs_BV.argmax(-1).tolist(), strict=True):
                answer.append(token)
        return answers, list(logprobs_BV)

    def _loaded(self, spec: HostSpec, num_slots: int) -> RankGroupHost:
        plan = HostPlan(spec.name, ModelConfig(model=spec.source.path), spec.roles, {}, spec.serves)
        if self._group is None:
            self._group = RankGroupHost(spec, plan, unwrapped, start_timeout_s=TIMEOUT_S, step_timeout_s=TIMEOUT_S)
        elif self._num_loaded >= MOST_LOADED:  # each model leaves groups behind, whose threads take processor time
            self._group.close()
            self._group, self._num_loaded = None, 0
            return self._loaded(spec, num_slots)
        elif self._group.is_lost or self._group.spec != spec:
            self._group.load(spec, plan)
            self._num_loaded += 1
        self._group.loaded(spec.title)
        self._group.resize(num_slots).result()
        return self._group


def why_no_split(model: Any) -> str | None:
    """Why transformers' plans do not split a model's layers; None: they do."""
    share = split_share(model)
    if not model.tp_plan:
        return "transformers has no tensor parallel plan of it"
    if share < LEAST_SHARE:
        return f"transformers' tensor parallel plan splits only {share:.0%} of its layers' weights"
    return None


def split_share(model: Any) -> float:
    """The share of the weights of a model's layers that transformers' plans split: all but those of embeddings."""
    decoder = model.get_decoder()
    plans = [model._expand_parallel_plan(plan) for plan in (model.tp_plan, model.ep_plan) if plan]
    split = {name for plan in plans for name, style in plan.items() if not style.startswith("replicat")}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embeddings = [each for each in decoder.modules() if isinstance(each, nn.Embedding)]
    left_out = {id(parameter) for each in embeddings for parameter in each.parameters()}
    sizes = {
        names[id(each)]: each.numel()
        for each in decoder.parameters()
        if id(each) in names and id(each) not in left_out and each.ndim > 1
    }
    return float(sum(size for name, size in sizes.items() if name in split) / max(1, sum(sizes.values())))


def _reason(error: CageError) -> str:
    """What the ranks said, without the names of host and model."""
    return " ".join(str(error).split()).rsplit(" failed in ", 1)[-1].partition(": ")[2][:160]
