"""Solve many small linear systems with bits that do not depend on the batch.

Shapes: B rows, J unknowns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_small(matrix_BJJ: Tensor, right_BJ: Tensor) -> Tensor:
    """Return x [B, J] with matrix x = right, by Gauss-Jordan elimination with partial pivoting.

    Elementwise on purpose: a batched LAPACK or matmul kernel may round a row differently in another batch.
    A singular matrix gives values that are not finite, never an exception.
    """
    num_unknowns = right_BJ.shape[1]
    augmented = torch.cat([matrix_BJJ, right_BJ[..., None]], -1)
    rows_J = torch.arange(num_unknowns, device=right_BJ.device)
    for k in range(num_unknowns):
        if k < num_unknowns - 1:
            augmented = _with_pivot(augmented, k, rows_J)
        pivot_row = augmented[:, k] / augmented[:, k, k, None]
        factors = augmented[:, :, k].clone()
        factors[:, k] = 0.0
        augmented = augmented - factors[..., None] * pivot_row[:, None]
        augmented[:, k] = pivot_row
    return augmented[..., -1]


def _with_pivot(augmented: Tensor, k: int, rows_J: Tensor) -> Tensor:
    """Swap row k with the row at or below it that has the largest entry in column k."""
    size_BJ = torch.where(rows_J >= k, augmented[:, :, k].abs(), -1.0)
    pivot_B1 = size_BJ.argmax(1, keepdim=True)
    order_BJ = torch.where(rows_J == pivot_B1, k, rows_J.expand_as(size_BJ))
    order_BJ[:, k] = pivot_B1[:, 0]
    return torch.gather(augmented, 1, order_BJ[..., None].expand_as(augmented))
