"""The residual of a symmetric system in float64, whatever the precision of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor, library

from rep_fast.ops import native
from rep_fast.ops.backend import choose
from rep_fast.ops.cholesky import FEW_COLUMNS
from rep_fast.ops.gate_gradient import dense_rows
from rep_fast.ops.profile import recorded

# rows of C that the torch body widens to float64 at a time
_TILE_ROWS = 512


@library.custom_op("rep_fast::spd_residual", mutates_args=())
def _spd_residual(matrix: Tensor, shift: float, x: Tensor, b: Tensor) -> Tensor:
    """b − (C + shift·I) x, [M, n] float64; C [M, M] float32 or float64 is widened a tile at a time."""
    _check(matrix, x, b)
    M, n = b.shape
    chosen = choose("spd_solver", matrix.device)
    traffic = matrix.nbytes + x.nbytes + 2 * b.nbytes
    with recorded("spd_solver", chosen.name, flops=2 * M * M * n, bytes=traffic, device=b.device):
        if chosen.module is None or matrix.stride(1) != 1 or (chosen.is_cuda and n > FEW_COLUMNS):
            tiles = [rows.double() @ x for rows in matrix.split(_TILE_ROWS)]
            return b - torch.cat(tiles).add_(x, alpha=shift)
        rest = b.clone(memory_format=torch.contiguous_format)
        columns = dense_rows(x)
        if chosen.is_cuda:
            stream = native.stream_number(b.device)
            chosen.module.subtract_product(matrix=matrix, shift=shift, x=columns, rest=rest, stream=stream)
            return rest
        chosen.module.subtract_product(matrix, shift, columns, rest, chosen.level, native.n_threads())
        return rest


@_spd_residual.register_fake
def _(matrix: Tensor, shift: float, x: Tensor, b: Tensor) -> Tensor:
    _check(matrix, x, b)
    return b.new_empty(b.shape)


def spd_residual(matrix: Tensor, shift: float, x: Tensor, b: Tensor) -> Tensor:
    """b − (C + shift·I) x for C [M, M] float32 or float64 and float64 columns x, b [M, n]; [M, n] float64.

    Products and sums in float64; C is never widened as a whole.
    """
    return torch.ops.rep_fast.spd_residual(matrix, shift, x, b)


def _check(matrix: Tensor, x: Tensor, b: Tensor) -> None:
    torch._check_value(
        matrix.dim() == 2 and x.shape == b.shape and len(matrix) == len(b) and x.dtype == b.dtype == torch.float64,
        lambda: f"spd_residual: x and b must be ({len(matrix)}, n) float64, got {x.shape} and {b.shape}",
    )
