"""PRUNE: an update's singular values held near the largest one of the weight it belongs to (methods §5.11).

  ΔW = U diag(s) Vᵀ, σ = σ_max(W_0):   s'_i = s_i where s_i ≤ σ, else σ + log_a(s_i / σ)

Many accumulated edits grow singular values far above those of the weight, which is what ruins the model; this bounds
them and leaves directions and small values alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rep_fast.edits.applying import check_fits
from rep_fast.edits.delta import Delta
from rep_fast.edits.dense import Dense
from rep_fast.edits.edit import Edit, ModuleEdit, past_keys_of
from rep_fast.edits.low_rank import LowRank
from rep_fast.edits.slices import Slices
from rep_fast.errors import HparamError, LayerError

if TYPE_CHECKING:
    from rep_fast.models import EditableLM


def prune(edit: Edit, lm: EditableLM, *, base: float = math.e) -> Edit:
    """The edit with the singular values of its deltas pruned.

    Args:
        edit: usually of many facts, see `accumulate`.
        lm: the clean model.
        base: a of the logarithm; smaller values prune less.
    Returns:
        Edit of the same kinds of delta; modules below the limit are the same objects, the others lose their `vectors`,
        which described the update as it was. `notes["prune"]`: base and, per module, largest value before and limit.
    Raises:
        HparamError: base not above 1, or edits are active in the model. LayerError: a delta of another kind.
    Cost: a low-rank delta O((D + M) r²), plus the largest eigenvalue of W Wᵀ.
    """
    if base <= 1.0:
        raise HparamError(f"base={base} of PRUNE's logarithm must be above 1; the paper takes e")
    check_clean(lm, "PRUNE")
    check_fits(lm, edit)
    modules, report = [], []
    for module in edit.modules:
        if module.delta is None:
            modules.append(module)
            continue
        limit = spectral_norm(lm.linear_weight(*module.place))
        pruned, largest = _pruned(module, limit, base)
        modules.append(
            module if pruned is module.delta else replace(module, delta=pruned, vectors=past_keys_of(module))
        )
        report.append({"layer": module.layer, "linear": module.linear, "largest": largest, "limit": limit})
    notes: dict[str, Any] = {**edit.notes, "prune": {"base": base, "modules": report}}
    return replace(edit, modules=tuple(modules), notes=notes)


def check_clean(lm: EditableLM, what: str) -> None:
    """Refuse a model whose weights may carry edits.

    Raises:
        HparamError: edits are active.
    """
    if lm.active_edits:
        raise HparamError(
            f"{what} compares with the unedited weights; undo the {len(lm.active_edits)} active edits first"
        )


def spectral_norm(weight: Tensor) -> float:
    """σ_max, from the largest eigenvalue of the smaller Gram matrix in float64."""
    wide = weight.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0.0).sqrt())


def _pruned(module: ModuleEdit, limit: float, base: float) -> tuple[Delta, float]:
    """The delta, itself where nothing exceeds the limit, and its largest singular value."""
    delta = module.delta
    if isinstance(delta, LowRank):
        # thin QR of both factors leaves an r × r matrix with the same singular values
        q_left, r_left = torch.linalg.qr(delta.left.double())
        q_right, r_right = torch.linalg.qr(delta.right.double().T)
        u, values, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        largest = _largest(values)
        if largest <= limit:
            return delta, largest
        left = q_left @ u * _bounded(values, limit, base)
        return LowRank(left.to(delta.left), (vh @ q_right.T).to(delta.right)), largest
    if not isinstance(delta, (Slices, Dense)):
        raise LayerError(f"PRUNE knows low-rank deltas, slices and dense ones, not those of {module.linear!r}")
    # slices have the singular values of the whole matrix, which is zero around them
    matrix = delta.values if isinstance(delta, Slices) else delta.matrix
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    largest = _largest(values)
    if largest <= limit:
        return delta, largest
    bounded = ((u * _bounded(values, limit, base)) @ vh).to(matrix)
    return replace(delta, values=bounded) if isinstance(delta, Slices) else Dense(bounded), largest


def _largest(values: Tensor) -> float:
    return float(values[0]) if len(values) else 0.0


def _bounded(values: Tensor, limit: float, base: float) -> Tensor:
    return torch.where(values <= limit, values, limit + (values / limit).log() / math.log(base))
