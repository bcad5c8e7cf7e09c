"""What a second moment must be before it is factored: square, finite, symmetric up to rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rep_fast.errors import HparamError, NonFiniteError

# rows and columns of C that are looked at together: a tile and its mirror image (512 KB) stay in the second-level cache
_TILE_ROWS = 256
# entries C_ij and C_ji of a symmetric product may differ by the rounding of its summation
_ASYMMETRY = {torch.float32: 1e-4, torch.float64: 1e-8}


def symmetric(matrix: Tensor) -> Tensor:
    """C itself, or its symmetric part where rounding made it unsymmetric.

    Raises:
        HparamError: not square, of another dtype than float32 and float64, or asymmetric beyond rounding.
        NonFiniteError: a NaN or infinity.
    """
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] and matrix.shape[0] > 0
    if not square or matrix.dtype not in _ASYMMETRY:
        raise HparamError(
            f"SpdSolver: second moment must be (M, M) float32|float64, got {tuple(matrix.shape)} {matrix.dtype}"
        )
    matrix = matrix.detach()
    largest = max(_largest_entry(rows, first) for first, rows in _tiles(matrix))
    difference = 0.0
    for first, rows in _tiles(matrix):
        for other, other_rows in _tiles(matrix[: first + _TILE_ROWS]):
            tile, mirrored = rows[:, other : other + _TILE_ROWS], other_rows[:, first : first + _TILE_ROWS].T
            if not torch.equal(tile, mirrored):
                difference = max(difference, float((tile - mirrored).abs().max()))
    if difference > _ASYMMETRY[matrix.dtype] * largest:
        raise HparamError(
            f"SpdSolver: second moment is not symmetric, |C - Cᵀ| reaches {difference:.2e} with entries up to"
            f" {largest:.2e}; pass a full symmetric matrix, not one triangle"
        )
    return matrix if difference == 0.0 else (matrix + matrix.T) / 2


def _tiles(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of `_TILE_ROWS` rows at a time."""
    for first in range(0, matrix.shape[0], _TILE_ROWS):
        yield first, matrix[first : first + _TILE_ROWS]


def _largest_entry(rows: Tensor, first: int) -> float:
    smallest, largest = (float(value) for value in rows.aminmax())
    if not math.isfinite(smallest) or not math.isfinite(largest):
        row = first + int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
        raise NonFiniteError(f"SpdSolver: second moment holds a NaN or infinity in row {row}")
    return max(-smallest, largest)
