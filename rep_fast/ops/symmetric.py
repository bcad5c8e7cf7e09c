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
    largest, difference = _largest_entry(matrix), _largest_difference(matrix)
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


def _largest_entry(matrix: Tensor) -> float:
    """Of all |C_ij|; the host waits once, not for every tile."""
    extremes = torch.stack([torch.stack(rows.aminmax()) for _, rows in _tiles(matrix)]).tolist()
    for (first, rows), found in zip(_tiles(matrix), extremes, strict=True):
        if not all(map(math.isfinite, found)):  # a NaN anywhere makes both NaN
            row = first + int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
            raise NonFiniteError(f"SpdSolver: second moment holds a NaN or infinity in row {row}")
    return max(max(-smallest, largest) for smallest, largest in extremes)


def _largest_difference(matrix: Tensor) -> float:
    """Of all |C_ij − C_ji|; only tiles that are not each other's mirror image are subtracted."""
    pairs = [
        (rows[:, other : other + _TILE_ROWS], other_rows[:, first : first + _TILE_ROWS].T)
        for first, rows in _tiles(matrix)
        for other, other_rows in _tiles(matrix[: first + _TILE_ROWS])
    ]
    differs = torch.stack([(tile != mirrored).any() for tile, mirrored in pairs]).tolist()
    found = [
        (tile - mirrored).abs().max() for (tile, mirrored), is_other in zip(pairs, differs, strict=True) if is_other
    ]
    return float(torch.stack(found).max()) if found else 0.0
