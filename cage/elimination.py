"""Solve many small linear systems, with bits that do not depend on the batch.

Everything is elementwise: a batched LAPACK or matmul kernel may round a row differently in another batch.

Shapes: B rows, J unknowns, R right-hand sides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_small(matrix_BJJ: Tensor, right_BJR: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [B, J, R] with matrix x = right, and the sign [B] of the determinant.

    A singular matrix gives values that are not finite, never an exception.
    """
    if right_BJR.shape[1] == 1:
        return right_BJR / matrix_BJJ, matrix_BJJ[:, 0, 0].sign()
    if right_BJR.shape[1] == 2:
        return _solve_two(matrix_BJJ, right_BJR)
    if torch.compiler.is_compiling():
        return eliminate_by_entries(matrix_BJJ, right_BJR)
    return eliminate(matrix_BJJ, right_BJR)


def _solve_two(matrix_B22: Tensor, right_B2R: Tensor) -> tuple[Tensor, Tensor]:
    """Solve by Cramer's rule."""
    adjugate_B22 = torch.stack(
        [
            torch.stack([matrix_B22[:, 1, 1], -matrix_B22[:, 0, 1]], -1),
            torch.stack([-matrix_B22[:, 1, 0], matrix_B22[:, 0, 0]], -1),
        ],
        1,
    )
    determinant_B = matrix_B22[:, 0, 0] * matrix_B22[:, 1, 1] - matrix_B22[:, 0, 1] * matrix_B22[:, 1, 0]
    scaled_B2R = (
        adjugate_B22[:, :, 0, None] * right_B2R[:, None, 0] + adjugate_B22[:, :, 1, None] * right_B2R[:, None, 1]
    )
    return scaled_B2R / determinant_B[:, None, None], determinant_B.sign()


def eliminate(matrix_BJJ: Tensor, right_BJR: Tensor) -> tuple[Tensor, Tensor]:
    """Solve by Gauss-Jordan elimination with partial pivoting, a column of all systems at a time."""
    num_unknowns = right_BJR.shape[1]
    augmented = torch.cat([matrix_BJJ, right_BJR], -1)
    pivots, places = [], []
    for k in range(num_unknowns):
        place_B1 = augmented[:, k:, k].abs().argmax(1, keepdim=True) + k
        place = place_B1[..., None].expand(-1, 1, augmented.shape[2])
        pivot_row = augmented.gather(1, place)
        augmented.scatter_(1, place, augmented[:, k : k + 1].clone())
        pivots.append(pivot_row[:, :, k])
        places.append(place_B1 - k)
        pivot_row = pivot_row / pivot_row[:, :, k, None]
        augmented.addcmul_(augmented[:, :, k, None].clone(), pivot_row, value=-1.0)
        augmented[:, k] = pivot_row[:, 0]
    num_swaps_B = (torch.cat(places, 1) > 0).sum(1)
    sign_B = torch.cat(pivots, 1).sign().prod(1) * (1 - 2 * (num_swaps_B % 2))
    return augmented[:, :, num_unknowns:], sign_B


def eliminate_by_entries(matrix_BJJ: Tensor, right_BJR: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same bits as `eliminate`, computed with one tensor [B] per entry of the system.

    For torch.compile: with no axis but the batch, the whole elimination fuses into one kernel.
    """
    rows = [list(row_BC.unbind(1)) for row_BC in torch.cat([matrix_BJJ, right_BJR], -1).unbind(1)]
    sign_B = torch.ones_like(rows[0][0])
    for k, row in enumerate(rows):
        largest_B, place_B = row[k].abs(), torch.full_like(row[k], k)
        for at in range(k + 1, len(rows)):
            size_B = rows[at][k].abs()
            is_larger_B = (size_B > largest_B) | (size_B.isnan() & ~largest_B.isnan())
            largest_B, place_B = torch.where(is_larger_B, size_B, largest_B), torch.where(is_larger_B, at, place_B)
        for at in range(k + 1, len(rows)):
            _swap_where(place_B == at, row, rows[at], start=k)
        sign_B = sign_B * row[k].sign() * torch.where(place_B > k, -1.0, 1.0)
        row[k + 1 :] = [entry_B / row[k] for entry_B in row[k + 1 :]]
        for at, other in enumerate(rows):
            if at != k:
                other[k + 1 :] = [
                    torch.addcmul(entry_B, other[k], pivot_B, value=-1.0)
                    for entry_B, pivot_B in zip(other[k + 1 :], row[k + 1 :], strict=True)
                ]
    return torch.stack([torch.stack(row[len(rows) :], -1) for row in rows], 1), sign_B


def _swap_where(is_swapped_B: Tensor, one: list[Tensor], other: list[Tensor], *, start: int) -> None:
    for at in range(start, len(one)):
        one[at], other[at] = (
            torch.where(is_swapped_B, other[at], one[at]),
            torch.where(is_swapped_B, one[at], other[at]),
        )
