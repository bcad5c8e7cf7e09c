"""Symmetric matrices as their packed lower triangle, half the memory: rows 0, 1, 2 … one after another."""

from __future__ import annotations

import torch
from torch import Tensor

_MIRRORED_ROWS = 512


def packed(matrix: Tensor) -> Tensor:
    """Lower triangle of [M, M] as [M(M + 1)/2], row by row; entries above the diagonal are not read."""
    width = matrix.shape[0]
    result = matrix.new_empty(width * (width + 1) // 2)
    # by rows: an index of the triangle would need more memory than the matrix
    for row in range(width):
        start = row * (row + 1) // 2
        result[start : start + row + 1] = matrix[row, : row + 1]
    return result


def width_of(triangle: Tensor) -> int:
    """M of a packed triangle, 0 when its length is that of none."""
    width = round((2 * triangle.numel() + 0.25) ** 0.5 - 0.5)
    return width if triangle.ndim == 1 and width * (width + 1) // 2 == triangle.numel() else 0


def unpacked(triangle: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The symmetric matrix [M, M], exactly symmetric, with no other memory than its own."""
    width = width_of(triangle)
    matrix = torch.empty(width, width, dtype=dtype, device=triangle.device)
    for row in range(width):
        start = row * (row + 1) // 2
        matrix[row, : row + 1] = triangle[start : start + row + 1]
    # by blocks of rows: what is copied above the diagonal was written below it
    for first in range(0, width, _MIRRORED_ROWS):
        rows = matrix[first : first + _MIRRORED_ROWS]
        end = first + rows.shape[0]
        corner = rows[:, first:end]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        rows[:, end:] = matrix[end:, first:end].T
    return matrix
