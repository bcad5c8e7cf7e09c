"""The closed form behind MEMIT, EMMET, PMET and AlphaEdit, in n×n systems (methods §5.3 to §5.7).

All four minimise ‖ΔW K − R‖² + ‖ΔW K_past‖² + ridge·tr(ΔW N⁻¹ ΔWᵀ) for a metric N on key space: C⁻¹ for MEMIT and its
kin (disturb the corpus least), the null-space projector P for AlphaEdit (do not disturb it at all). With
A = [K, K_past] and E the first n columns of the identity the solution is

  ΔW = R Eᵀ (ridge·I + AᵀNA)⁻¹ (NA)ᵀ,

a system as large as there are facts; K_past are keys of earlier edits, whose wanted residual is zero. The papers solve
the same equations as ΔW (ridge·N⁻¹ + AAᵀ) = R Kᵀ, M×M, for each layer and batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.edits import LowRank
from rep_fast.errors import SolverError


@dataclass(frozen=True)
class BatchUpdate:
    """ΔW = residuals · rows of n facts.

    residuals: R [D, n]. rows: [n, M], ΔW k = R (rows k). images: NK [M, n], what the metric makes of the keys. float64.
    """

    residuals: Tensor
    rows: Tensor
    images: Tensor

    def delta(self, dtype: torch.dtype = torch.float64) -> LowRank:
        """ΔW, of rank n."""
        return LowRank(self.residuals.to(dtype).contiguous(), self.rows.to(dtype).contiguous())


def solve_batch(
    keys: Tensor,
    residuals: Tensor,
    *,
    metric: Callable[[Tensor], Tensor],
    ridge: float,
    past: Tensor | None = None,
) -> BatchUpdate:
    """The update that writes all residuals at their keys, as far as the ridge lets it.

    Args:
        keys: K [M, n] float64. residuals: R [D, n] float64, same device.
        metric: A [M, a] → NA [M, a] float64, N symmetric and positive semidefinite.
        ridge: λ of MEMIT, α·λ_e of EMMET, L2 of AlphaEdit; 0 meets ΔW K = R exactly (and ΔW K_past = 0).
        past: K_past [M, p] float64, None for none.
    Raises:
        SolverError: ridge 0 and keys that depend linearly on each other under the metric.
    Cost: the metric on n + p columns, (n + p)²·M for AᵀNA, (n + p)³/3.
    """
    n = keys.shape[1]
    columns = keys if past is None else torch.cat([keys, past], dim=1)
    images = metric(columns)
    gram = columns.T @ images
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    # a pivot of rounding size means dependence that rounding happened to lift above zero
    rounding = len(gram) * torch.finfo(gram.dtype).eps * gram.diagonal().max()
    if bool((failed != 0) | (pivots.min() <= rounding)):
        raise SolverError(
            f"{n} keys to write and {len(gram) - n} past ones depend linearly on each other, so that no update serves "
            f"all of them with a ridge of {ridge:g}; give the method a larger one"
        )
    wanted = torch.eye(len(gram), n, dtype=gram.dtype, device=gram.device)
    return BatchUpdate(residuals, torch.cholesky_solve(wanted, factor).T @ images.T, images[:, :n])


def spread_share(step: int, n_layers: int, *, root: bool = False) -> float:
    """Share of the missing residual that layer number `step` (from 0) of `n_layers` takes.

    1/(B − i), so that perfect writes put an equal part into each layer; with `root` 1/√(B − i) (PMET), which gives the
    first layers more.
    """
    left = n_layers - step
    return 1 / math.sqrt(left) if root else 1 / left
