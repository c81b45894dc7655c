"""Solve many small linear systems with bits that do not depend on the batch.

Shapes: B rows, J unknowns, R right-hand sides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_small(matrix_BJJ: Tensor, right_BJR: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [B, J, R] with matrix x = right, and the sign [B] of the determinant.

    Elementwise on purpose: a batched LAPACK or matmul kernel may round a row differently in another batch.
    A singular matrix gives values that are not finite, never an exception.
    """
    if right_BJR.shape[1] == 1:
        return right_BJR / matrix_BJJ, matrix_BJJ[:, 0, 0].sign()
    if right_BJR.shape[1] == 2:
        return _solve_two(matrix_BJJ, right_BJR)
    return _eliminate(matrix_BJJ, right_BJR)


def _solve_two(matrix_B22: Tensor, right_B2R: Tensor) -> tuple[Tensor, Tensor]:
    """Cramer's rule."""
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


def _eliminate(matrix_BJJ: Tensor, right_BJR: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss-Jordan elimination with partial pivoting."""
    num_unknowns = right_BJR.shape[1]
    augmented = torch.cat([matrix_BJJ, right_BJR], -1)
    rows_J = torch.arange(num_unknowns, device=right_BJR.device)
    sign_B = torch.ones_like(right_BJR[:, 0, 0])
    for k in range(num_unknowns):
        pivot_B1 = torch.where(rows_J >= k, augmented[:, :, k].abs(), -1.0).argmax(1, keepdim=True)
        order_BJ = torch.where(rows_J == pivot_B1, k, rows_J)
        order_BJ[:, k] = pivot_B1[:, 0]
        augmented = augmented.gather(1, order_BJ[..., None].expand_as(augmented))
        pivot_B = augmented[:, k, k]
        sign_B = sign_B * pivot_B.sign() * torch.where(pivot_B1[:, 0] == k, 1.0, -1.0)
        pivot_row = augmented[:, k] / pivot_B[:, None]
        factors_BJ = augmented[:, :, k].clone()
        factors_BJ[:, k] = 0.0
        augmented = augmented - factors_BJ[..., None] * pivot_row[:, None]
        augmented[:, k] = pivot_row
    return augmented[:, :, num_unknowns:], sign_B
