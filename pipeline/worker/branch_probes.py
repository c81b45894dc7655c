"""Checks at load that a row's scores have the same bits alone and beside other rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.topology import HostRole
from pipeline.worker.branch_runner import BranchRunner
from pipeline.worker.probes import NUM_OTHERS, SMALL

NUM_CANDIDATES = 3  # of each row


@torch.inference_mode()
def bits_are_a_rows_own(
    make_runner: Callable[..., BranchRunner], roles: Sequence[HostRole], ids: Sequence[int]
) -> bool:
    """Whether the gains of a row's candidates have the same bits alone and beside other rows.

    Which matrix kernels a processor has, and what else a model computes, decides that, so it is tried.

    Args:
        make_runner: makes a runner, whose tokens are the base's, with `num_slots` slots.
        roles: its roles.
        ids: token ids of a probe.
    """
    texts = [ids[: SMALL + 5], *(ids[at : at + 2 + at % 5] for at in range(NUM_OTHERS))]

    def gains(texts: Sequence[Sequence[int]]) -> Tensor:
        """Of the first text, [R, K]: its candidates are scored with those of the others."""
        runner, slots = make_runner(num_slots=len(texts)), list(range(len(texts)))
        prompts = [{role.name: text[:-1] for role in roles} for text in texts]
        runner.advance(Step([Admission(slot, prompt) for slot, prompt in enumerate(prompts)]))
        runner.advance(Step((), slots, [text[-1] for text in texts]))
        return runner.gains(slots, [ids[-NUM_CANDIDATES:]] * len(texts))[0]

    alone, *beside = [gains(each) for each in (texts[:1], texts[:3], texts)]
    return all(torch.equal(each, alone) for each in beside)
