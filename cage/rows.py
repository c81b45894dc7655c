"""Drive a batched iteration in which every row ends by itself.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from cage.normalization import NormalizedGame

State = TypeVar("State", bound=NamedTuple)

_STEPS_A_CHECK = {"cpu": 1}  # asking a GPU whether rows are done makes the host wait for it
_STEPS_A_CHECK_ELSEWHERE = 8
_NUMBERS_WORTH_DROPPING = 2**11  # carrying fewer along costs less than dropping them


def iterate(
    step: Callable[[NormalizedGame, State], State], game: NormalizedGame, state: State, *, max_steps: int
) -> State:
    """Apply step until no row is running; rows that are done are dropped at the next check.

    So few of them that carrying them along is cheaper than dropping them wait for more.

    The first field of the state is the bool [B] `running`; every field has one entry a row. A step must leave
    rows that are not running as they are, and treat every row by itself: then a row's result does not depend on
    its company.
    """
    result = list(state)
    steps_a_check = _STEPS_A_CHECK.get(game.values.device.type, _STEPS_A_CHECK_ELSEWHERE)
    order_B = torch.arange(game.values.shape[0], device=game.values.device)
    for count in range(max_steps):
        if count % steps_a_check == 0:
            running = state[0].nonzero()[:, 0]
            num_done = order_B.shape[0] - running.shape[0]
            if num_done and (running.shape[0] == 0 or num_done * game.values[0].numel() >= _NUMBERS_WORTH_DROPPING):
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
