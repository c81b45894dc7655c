"""Drive a batched iteration in which every row ends independently.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cage.normalization import NormalizedGame

State = TypeVar("State", bound=NamedTuple)

STEPS_PER_CHECK = {"cpu": 1}  # reading from a GPU whether rows are done makes the host wait for it
_STEPS_PER_CHECK_ELSEWHERE = 8
_ELEMENTS_WORTH_DROPPING = 2**11  # rows that are done and together smaller than this cost less to keep than to drop


def iterate(
    step: Callable[[NormalizedGame, State], State], game: NormalizedGame, state: State, *, max_steps: int
) -> State:
    """Apply step until no row is running, and return the final state of all rows.

    step: returns the next state. It must leave rows that are not running as they are and use no other row to compute
        a row; then a row's result does not depend on the batch composition.
    state: a NamedTuple of tensors with one entry per row, whose first field is the bool [B] `running`.
    max_steps: most calls of step; rows may still be running afterwards.

    Rows that are done are dropped from the batch at the next check, or later if there are so few that copying the
    others would take longer than computing them in vain.
    """
    result = list(state)
    steps_per_check = STEPS_PER_CHECK.get(game.values.device.type, _STEPS_PER_CHECK_ELSEWHERE)
    order_B = torch.arange(game.values.shape[0], device=game.values.device)
    for count in range(max_steps):
        if count % steps_per_check == 0:
            running = state[0].nonzero()[:, 0]
            num_done = order_B.shape[0] - running.shape[0]
            if num_done and (running.shape[0] == 0 or num_done * game.values[0].numel() >= _ELEMENTS_WORTH_DROPPING):
                _put(result, order_B, state)
                game, order_B = game.rows(running), order_B[running]
                state = _rows(state, running)
            if running.shape[0] == 0:
                break
        state = step(game, state)
    _put(result, order_B, state)
    return type(state)(*result)


def _rows(state: State, index: Tensor) -> State:
    return type(state)(*(part[index] for part in state))


def _put(result: list[Tensor], order_B: Tensor, state: State) -> None:
    for i, part in enumerate(state):
        result[i] = result[i].index_copy(0, order_B, part)
