"""Scores of the rows and columns of a weight gradient, from the gradient itself."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_scores(x: Tensor, g: Tensor, *, score: str, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores (columns [D_out], rows [D_in]) of G = xᵀg in float64; `gxw` needs the weight [D_in, D_out]."""
    G = x.double().T @ g.double()  # [D_in, D_out]
    if score == "sum":
        return G.sum(0), G.sum(1)
    if score == "abs_sum":
        return G.sum(0).abs(), G.sum(1).abs()
    if score == "l2":
        return G.norm(dim=0), G.norm(dim=1)
    if score == "gxw":
        assert weight is not None
        product = weight.double() * G  # [D_in, D_out]
        return product.sum(0), product.sum(1)
    if score == "zabs":
        return _standardised(G, dim=1).abs().mean(0), _standardised(G, dim=0).abs().mean(1)
    raise ValueError(f"no reference for score {score!r}")


def _standardised(G: Tensor, *, dim: int) -> Tensor:
    """(G − mean) / unbiased deviation along `dim`; 0 where the deviation is 0."""
    centred = G - G.mean(dim, keepdim=True)
    deviation = centred.square().sum(dim, keepdim=True).div(max(G.shape[dim] - 1, 1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0.0)
