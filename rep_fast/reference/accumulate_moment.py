"""Second moment of keys in float64."""

from __future__ import annotations

from torch import Tensor


def accumulate_moment(lower: Tensor, keys: Tensor) -> Tensor:
    """lower + tril(Σ_t k_t k_tᵀ), [M, M] float64; a new tensor."""
    wide = keys.double()  # [T, M]
    return lower.double() + (wide.T @ wide).tril()  # [M, M]
