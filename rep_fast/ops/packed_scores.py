"""Scores of the rows and columns of a weight gradient that is never formed.

For y = xW and g = ∂L/∂y the gradient of the weight is G = xᵀg. Tracing the parameter path of a fact needs one number
per row and per column of G; all of them follow from x and g (path-editing method, methods §7.3). The tiled pass of
`zabs` has kernels for the CPU and for GPUs; everything else is torch in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, library

from rep_fast.errors import HparamError, NonFiniteError
from rep_fast.ops import native
from rep_fast.ops.backend import Backend, choose_or_warn
from rep_fast.ops.finite import is_finite
from rep_fast.ops.gate_gradient import dense_rows
from rep_fast.ops.profile import recorded

SCORES = ("sum", "abs_sum", "l2", "gxw", "zabs")
NODES = ("both", "columns", "rows")
_NAME = "packed_scores"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# products of this many columns of `a` with all columns of `b` are alive at once in the torch body
_TILE_COLUMNS = 64
_EPS64 = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class PackedScores:
    """One float64 score per column [D_out] and per row [D_in] of G; a side that was not asked for raises when read."""

    score: str
    column_scores: Tensor | None
    row_scores: Tensor | None

    @property
    def columns(self) -> Tensor:
        """[D_out] float64."""
        if self.column_scores is None:
            raise HparamError(f"packed_scores: columns were not computed; {_remedy(self.score, 'columns')}")
        return self.column_scores

    @property
    def rows(self) -> Tensor:
        """[D_in] float64."""
        if self.row_scores is None:
            raise HparamError(f"packed_scores: rows were not computed; {_remedy(self.score, 'rows')}")
        return self.row_scores


def _remedy(score: str, side: str) -> str:
    if score == "gxw":
        return "pass " + ("weight_output=" if side == "columns" else "input_gradient=")
    return f"pass nodes='both' or nodes='{side}'"


def packed_scores(
    x: Tensor,
    g: Tensor,
    *,
    score: str,
    weight_output: Tensor | None = None,
    input_gradient: Tensor | None = None,
    nodes: str = "both",
    check_finite: bool = True,
) -> PackedScores:
    """Scores of the columns and rows of G = xᵀg, without G.

    Per column j (rows alike, with the roles of x and g swapped):
      sum      Σ_i G_ij = Σ_t (Σ_i x_ti) g_tj;  abs_sum its absolute value
      l2       ‖G_·j‖₂, square = g_jᵀ (x xᵀ) g_j
      gxw      Σ_i W_ij G_ij = Σ_t y_tj g_tj for columns, Σ_t x_ti (∂L/∂x)_ti for rows
      zabs     mean over i of |G_ij − μ_i| / σ_i, μ_i and σ_i mean and unbiased deviation of row i over the columns;
               σ_i = 0 contributes 0
    (path-editing method, methods §7.2–7.3.)

    Args:
        x: [T, D_in] inputs of the linear map, float32, float64, bfloat16 or float16; rows may be padded.
        g: [T, D_out] ∂L/∂y, same device.
        score: one of `SCORES`.
        weight_output: [T, D_out] y = xW without the bias; gives the columns of `gxw`.
        input_gradient: [T, D_in] ∂L/∂x; gives the rows of `gxw`.
        nodes: "both", "columns" or "rows": what to compute (zabs costs one product each).
        check_finite: False leaves out the look at x and g, which waits for a GPU; a NaN or infinity in them makes
            scores non-finite.
    Returns:
        PackedScores in float64. All but `zabs` are computed in float64; `zabs` takes both moments in float64 and the
        product in float32 (in float64 when x or g is float64).
    Raises:
        HparamError: unknown score or nodes, shapes, dtypes or devices that do not fit, gxw without its products.
        NonFiniteError: a NaN or infinity in x or g.
    Cost: sum, gxw O(T(D_in + D_out)); l2 O(T²(D_in + D_out)); zabs O(T D_in D_out) and O(T(D_in + D_out)) memory.
    """
    _check(x, g, score, nodes)
    if check_finite:
        _check_finite(x, g)
    want_columns, want_rows = nodes != "rows", nodes != "columns"
    if score == "gxw":
        return _gxw(x, g, weight_output, input_gradient, want_columns, want_rows)
    kernel = {"sum": _column_sum, "abs_sum": _column_abs_sum, "l2": _column_l2, "zabs": _column_zabs}[score]
    return PackedScores(score, kernel(x, g) if want_columns else None, kernel(g, x) if want_rows else None)


def _check(x: Tensor, g: Tensor, score: str, nodes: str) -> None:
    if score not in SCORES:
        raise HparamError(f"packed_scores: score must be one of {', '.join(SCORES)}, got {score!r}")
    if nodes not in NODES:
        raise HparamError(f"packed_scores: nodes must be one of {', '.join(NODES)}, got {nodes!r}")
    for name, tensor in (("x", x), ("g", g)):
        if tensor.dim() != 2 or tensor.dtype not in _DTYPES:
            raise HparamError(
                f"packed_scores: {name} must be (tokens, width) float32|bfloat16|float16|float64,"
                f" got {tuple(tensor.shape)} {tensor.dtype}"
            )
    if x.shape[0] != g.shape[0] or x.device != g.device:
        raise HparamError(
            f"packed_scores: x and g must agree in tokens and device, got {x.shape[0]} on {x.device}"
            f" and {g.shape[0]} on {g.device}"
        )


def _check_finite(x: Tensor, g: Tensor) -> None:
    for name, tensor in (("x", x), ("g", g)):
        if not is_finite(tensor):
            row = int((~torch.isfinite(tensor).all(dim=1)).nonzero()[0])
            raise NonFiniteError(f"packed_scores: {name} holds a NaN or infinity in row {row}")


def _gxw(
    x: Tensor, g: Tensor, weight_output: Tensor | None, input_gradient: Tensor | None, columns: bool, rows: bool
) -> PackedScores:
    if weight_output is None and input_gradient is None:
        raise HparamError("packed_scores: score 'gxw' needs weight_output= (columns) or input_gradient= (rows)")
    for name, tensor, like in (("weight_output", weight_output, g), ("input_gradient", input_gradient, x)):
        if tensor is not None and tensor.shape != like.shape:
            raise HparamError(f"packed_scores: {name} must be {tuple(like.shape)}, got {tuple(tensor.shape)}")
    column_scores = (weight_output.double() * g.double()).sum(0) if weight_output is not None and columns else None
    row_scores = (x.double() * input_gradient.double()).sum(0) if input_gradient is not None and rows else None
    return PackedScores("gxw", column_scores, row_scores)


def _column_sum(x: Tensor, g: Tensor) -> Tensor:
    return x.double().sum(1) @ g.double()


def _column_abs_sum(x: Tensor, g: Tensor) -> Tensor:
    return _column_sum(x, g).abs()


def _column_l2(x: Tensor, g: Tensor) -> Tensor:
    wide, upstream = x.double(), g.double()
    return ((wide @ wide.T) @ upstream).mul_(upstream).sum(0).clamp_min_(0.0).sqrt_()


def _column_zabs(x: Tensor, g: Tensor) -> Tensor:
    """Mean over i of |G_ij − μ_i| / σ_i for every column j.

    G_ij − μ_i = Σ_t x_ti (g_tj − mean_j g_tj): centring g first leaves a plain product, and σ_i has no cancelling
    terms, unlike Σ G² − Mμ².
    """
    upstream, wide = _of_size_one(g), _of_size_one(x)
    means = upstream.mean(1, keepdim=True)
    centred = upstream - means  # [T, D_out]
    degrees = max(g.shape[1] - 1, 1)
    variance = ((centred @ centred.T) @ wide).mul_(wide).sum(0) / degrees  # [D_in]
    # what float64 rounding alone can leave in `variance` when row i of G is constant
    largest = (centred.norm(dim=1) @ wide.abs()).square() / degrees
    floor = 8 * (g.shape[1] + x.shape[0]) * _EPS64 * largest
    # and in `centred`, whose means are rounded
    drift = g.shape[1] * _EPS64 * (means.abs().squeeze(1) @ wide.abs())
    floor += 2 * drift.square()
    inverse_sigma = torch.where(variance > floor, variance, 1.0).rsqrt() * (variance > floor)
    dtype = torch.float64 if torch.float64 in (x.dtype, g.dtype) else torch.float32
    scaled = wide.mul_(inverse_sigma)  # [T, D_in]
    return torch.ops.rep_fast.abs_product_sum(scaled.to(dtype), centred.to(dtype)) / x.shape[1]


def _of_size_one(matrix: Tensor) -> Tensor:
    """The matrix in float64 over a power of two near its largest entry: 1/σ of tiny gradients is beyond float32."""
    if matrix.numel() == 0:
        return matrix.double()
    smallest, largest = matrix.aminmax()
    size = torch.maximum(-smallest, largest).double()
    return matrix.double() * torch.where(size > 0, torch.exp2(-torch.log2(size).round().clamp_min(-1000.0)), 1.0)


def _check_product(a: Tensor, b: Tensor) -> Tensor:
    torch._check_value(
        a.dim() == 2 and b.dim() == 2 and a.shape[0] == b.shape[0] and a.dtype == b.dtype,
        lambda: (
            f"abs_product_sum: a and b must be (tokens, width) of one dtype, got {a.shape} {a.dtype}, "
            f"{b.shape} {b.dtype}"
        ),
    )
    return torch.empty(b.shape[1], dtype=torch.float64, device=b.device)


@library.custom_op("rep_fast::abs_product_sum", mutates_args=())
def _abs_product_sum(a: Tensor, b: Tensor) -> Tensor:
    """Σ_p |Σ_t a_tp b_tq| for every q, [Q] float64; aᵀb lives one tile at a time."""
    total = _check_product(a, b)
    is_double = a.dtype == torch.float64
    chosen = Backend("reference", "float64 products are torch's") if is_double else choose_or_warn(_NAME, a.device)
    flops = (2 * a.shape[0] + 2) * a.shape[1] * b.shape[1]
    traffic = a.nbytes + b.nbytes + total.nbytes
    with recorded(_NAME, chosen.name, flops=flops, bytes=traffic, device=a.device):
        if chosen.module is not None:
            left, right = (dense_rows(tensor) for tensor in (a, b))
            if chosen.is_cuda:
                _on_gpu(chosen.module, left, right, total)
                return total
            chosen.module.abs_product_sum(left, right, total, chosen.level, native.n_threads())
            return total
        total.zero_()
        for tile in a.split(_TILE_COLUMNS, dim=1):
            total += (tile.T @ b).abs_().sum(0, dtype=torch.float64)
        return total


def _on_gpu(module: ModuleType, a: Tensor, b: Tensor, total: Tensor) -> None:
    n_bytes = module.abs_product_scratch(n_tokens=a.shape[0], n_left=a.shape[1], n_right=b.shape[1])
    scratch = torch.empty(-(-n_bytes // 8), dtype=torch.float64, device=a.device)
    module.abs_product_sum(a=a, b=b, sums=total, scratch=scratch, stream=native.stream_number(a.device))


@_abs_product_sum.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return _check_product(a, b)
