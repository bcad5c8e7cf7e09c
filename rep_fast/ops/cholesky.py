"""Cholesky factors of a symmetrically scaled matrix, from SciPy's LAPACK on CPU and torch.linalg on GPU, and solves.

Float32 factors are solved with by kernels, on a GPU those for few right-hand sides; the rest is the libraries'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from scipy.linalg import lapack
from torch import Tensor, library

from rep_fast.ops import native
from rep_fast.ops.backend import choose
from rep_fast.ops.gate_gradient import dense_rows
from rep_fast.ops.profile import recorded

# rows of C that are scaled together: 1.4 MB at M = 11008, so that the second factor meets them in the cache
_TILE_ROWS = 32
# right-hand sides that share one read of the matrix on a GPU; more are the library's
FEW_COLUMNS = 64
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
        if self.inverses is not None:
            return torch.ops.rep_fast.cholesky_solve(self.lower, self.inverses, self.scale, b)
        return _library_solve(self.lower, self.scale, b)

    @cached_property
    def inverses(self) -> Tensor | None:
        """−L_bb⁻¹ of the diagonal blocks, [M, block], L_bb⁻¹ on a GPU; None where no native body solves with this
        factor."""
        chosen = choose("spd_solver", self.lower.device)
        module = chosen.module
        if module is None or self.lower.dtype != torch.float32:
            return None
        found = self.lower.new_empty(len(self.lower), module.solve_block)
        if chosen.is_cuda:
            stream = native.stream_number(found.device)
            module.invert_diagonal_blocks(lower=dense_rows(self.lower), inverses=found, stream=stream)
            return found
        module.invert_diagonal_blocks(self.lower, found, native.n_threads())
        return found


@library.custom_op("rep_fast::cholesky_solve", mutates_args=())
def _cholesky_solve(lower: Tensor, inverses: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    """S L⁻ᵀ L⁻¹ S b, [M, n] float64; arguments as in `Factor`."""
    _check_solve(lower, inverses, scale, b)
    M, n = b.shape
    chosen = choose("spd_solver", lower.device)
    traffic = 2 * M * M * lower.itemsize + 2 * b.nbytes
    with recorded("spd_solver", chosen.name, flops=2 * M * M * n, bytes=traffic, device=b.device):
        if chosen.module is None or (chosen.is_cuda and n > FEW_COLUMNS):
            return _library_solve(lower, scale, b)
        columns = dense_rows(b)
        x = torch.empty_like(columns, memory_format=torch.contiguous_format)
        if chosen.is_cuda:
            _solve_on_gpu(chosen.module, dense_rows(lower), inverses, scale, columns, x)
            return x
        chosen.module.cholesky_solve(lower, inverses, scale, columns, x, chosen.level, native.n_threads())
        return x


def _solve_on_gpu(
    module: ModuleType, lower: Tensor, inverses: Tensor, scale: Tensor, columns: Tensor, x: Tensor
) -> None:
    n_bytes = module.cholesky_solve_scratch(key_dim=len(lower), n_columns=columns.shape[1])
    module.cholesky_solve(
        lower=lower,
        inverses=inverses,
        scale=scale,
        b=columns,
        x=x,
        scratch=torch.empty(-(-n_bytes // 8), dtype=torch.int64, device=x.device),
        stream=native.stream_number(x.device),
    )


@_cholesky_solve.register_fake
def _(lower: Tensor, inverses: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    _check_solve(lower, inverses, scale, b)
    return b.new_empty(b.shape)


def _check_solve(lower: Tensor, inverses: Tensor, scale: Tensor, b: Tensor) -> None:
    torch._check_value(
        lower.dtype == inverses.dtype == torch.float32 and scale.dtype == b.dtype == torch.float64,
        lambda: f"cholesky_solve: lower must be float32 and b float64, got {lower.dtype} and {b.dtype}",
    )
    torch._check_value(
        b.dim() == 2 and len(lower) == len(b) == len(scale),
        lambda: f"cholesky_solve: b must be ({len(lower)}, n), got {b.shape}",
    )


def _library_solve(lower: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    """S L⁻ᵀ L⁻¹ S b by LAPACK, on GPU by torch."""
    scaled = b * scale.unsqueeze(1)
    # float32 would flush small residuals to zero: solve for columns of size one
    sizes = scaled.abs().amax(dim=0).clamp_min(torch.finfo(torch.float64).tiny) if b.shape[1] else 1.0
    scaled = (scaled / sizes).to(lower.dtype)
    if b.shape[1] == 0:
        solution = scaled
    elif b.device.type != "cpu":
        solution = torch.cholesky_solve(scaled, lower)
    else:
        potrs = lapack.spotrs if lower.dtype == torch.float32 else lapack.dpotrs
        # the row-major lower triangle is LAPACK's column-major upper one: no copy
        solution = torch.from_numpy(potrs(lower.numpy().T, scaled.numpy(), lower=0)[0])
    return (solution.double() * sizes * scale.unsqueeze(1)).contiguous()


def factorise(matrix: Tensor, *, shift: float, precision: str) -> tuple[Factor | None, int]:
    """Factor of matrix + shift·I, or None and the pivot (row) that is not safely positive."""
    diagonal = matrix.diagonal().double() + shift
    if not bool((diagonal > 0).all()):
        return None, int((diagonal <= 0).nonzero()[0])
    scale = torch.exp2(-torch.round(torch.log2(diagonal) / 2))
    dtype = _DTYPE_OF[precision]
    scaled = torch.zeros(matrix.shape, dtype=dtype, device=matrix.device)  # LAPACK leaves the other triangle alone
    # in the wider precision of the two: |C_ij| ≤ 1 / (s_i s_j) keeps what is scaled once inside float32's range
    factors = scale.to(torch.promote_types(matrix.dtype, dtype))
    for start in range(0, matrix.shape[0], _TILE_ROWS):  # the lower triangle only: nothing else is read
        end = min(start + _TILE_ROWS, matrix.shape[0])
        block, from_rows = scaled[start:end, :end], matrix[start:end, :end]
        # without a copy where both precisions are one
        product = torch.mul(from_rows, factors[start:end, None], out=block if matrix.dtype == dtype else None)
        block.copy_(product.mul_(factors[:end]))
        block[:, start:].tril_()
    scaled.diagonal().copy_(diagonal * scale.square())
    lower, pivot = _factor_in_place(scaled)
    if lower is None:
        return None, pivot
    # A pivot at rounding size means rank deficiency that rounding happened to lift above zero. M subtractions leave
    # some √M units of an entry around 1; of few they scatter, and a moment of 47 tokens passed 8 units.
    smallest, index = lower.diagonal().square().min(dim=0)
    if float(smallest) <= max(16.0, math.sqrt(matrix.shape[0])) * torch.finfo(dtype).eps:
        return None, int(index)
    return Factor(lower, scale), -1


def _factor_in_place(scaled: Tensor) -> tuple[Tensor | None, int]:
    if scaled.device.type != "cpu":
        # torch's factors are column-major: the upper one, transposed, is the row-major lower one without a copy
        transposed, info = torch.linalg.cholesky_ex(scaled.mT, upper=True)
        failed = int(info)
        return (None, failed - 1) if failed else (transposed.mT, -1)
    potrf = lapack.spotrf if scaled.dtype == torch.float32 else lapack.dpotrf
    upper, failed = potrf(scaled.numpy().T, lower=0, clean=0, overwrite_a=1)
    return (None, int(failed) - 1) if failed else (torch.from_numpy(upper.T), -1)
