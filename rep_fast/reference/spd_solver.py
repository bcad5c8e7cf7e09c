"""Solves with a symmetric positive definite matrix, by a float64 Cholesky factor."""

from __future__ import annotations

import torch
from torch import Tensor


def solve(second_moment: Tensor, right_hand_sides: Tensor) -> Tensor:
    """C⁻¹B, [M, n] float64."""
    lower = torch.linalg.cholesky(second_moment.double())  # [M, M]
    return torch.cholesky_solve(right_hand_sides.double(), lower)  # [M, n]


def similarity(second_moment: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """AᵀC⁻¹B, [a, b] float64."""
    return left.double().T @ solve(second_moment, right)
