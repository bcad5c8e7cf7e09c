"""Cholesky factors of a symmetrically scaled matrix, from SciPy's LAPACK on CPU and torch.linalg on GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.linalg import lapack
from torch import Tensor

_DTYPE_OF = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Factor:
    """S(C + shift·I)S = LLᵀ with a diagonal S of powers of two.

    Powers of two scale without rounding. The unit diagonal keeps entries inside float32's range whatever the size of
    the keys, and is within a factor M of the best condition any diagonal scaling can give (van der Sluis).

    Attributes:
        lower: L [M, M], float32 or float64, zero above the diagonal.
        scale: diagonal of S [M] float64.
    """

    lower: Tensor
    scale: Tensor

    def solve(self, b: Tensor) -> Tensor:
        """S L⁻ᵀ L⁻¹ S b for b [M, n] float64, in the precision of the factor; float64 out."""
        scaled = b * self.scale.unsqueeze(1)
        # float32 would flush small residuals to zero: solve for columns of size one
        sizes = scaled.abs().amax(dim=0).clamp_min(torch.finfo(torch.float64).tiny) if b.shape[1] else 1.0
        scaled = (scaled / sizes).to(self.lower.dtype)
        if b.shape[1] == 0:
            solution = scaled
        elif b.is_cuda:
            solution = torch.cholesky_solve(scaled, self.lower)
        else:
            potrs = lapack.spotrs if self.lower.dtype == torch.float32 else lapack.dpotrs
            # the row-major lower triangle is LAPACK's column-major upper one: no copy
            solution = torch.from_numpy(potrs(self.lower.numpy().T, scaled.numpy(), lower=0)[0])
        return solution.double() * sizes * self.scale.unsqueeze(1)


def factorise(matrix: Tensor, *, shift: float, precision: str) -> tuple[Factor | None, int]:
    """Factor of matrix + shift·I, or None and the pivot (row) that is not safely positive."""
    diagonal = matrix.diagonal().double() + shift
    if not bool((diagonal > 0).all()):
        return None, int((diagonal <= 0).nonzero()[0])
    scale = torch.exp2(-torch.round(torch.log2(diagonal) / 2))
    dtype = _DTYPE_OF[precision]
    scaled = torch.empty_like(matrix, dtype=dtype, memory_format=torch.contiguous_format)
    for start in range(0, matrix.shape[0], 512):  # the lower triangle only: nothing else is read
        rows = slice(start, start + 512)
        block = matrix[rows, : start + 512] * scale[rows].unsqueeze(1)  # float64, since scale is
        scaled[rows, : start + 512] = block.mul_(scale[: start + 512])
    scaled.diagonal().copy_(diagonal * scale.square())
    lower, pivot = _factor_in_place(scaled)
    if lower is None:
        return None, pivot
    # a pivot at rounding size means rank deficiency that rounding happened to lift above zero
    smallest, index = lower.diagonal().square().min(dim=0)
    if float(smallest) <= max(8.0, math.sqrt(matrix.shape[0])) * torch.finfo(dtype).eps:
        return None, int(index)
    return Factor(lower, scale), -1


def _factor_in_place(scaled: Tensor) -> tuple[Tensor | None, int]:
    if scaled.is_cuda:
        lower, info = torch.linalg.cholesky_ex(scaled)
        failed = int(info)
        return (None, failed - 1) if failed else (lower, -1)
    potrf = lapack.spotrf if scaled.dtype == torch.float32 else lapack.dpotrf
    upper, failed = potrf(scaled.numpy().T, lower=0, clean=1, overwrite_a=1)
    return (None, int(failed) - 1) if failed else (torch.from_numpy(upper.T), -1)
