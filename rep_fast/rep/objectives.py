"""The two training objectives of a key adapter, as plain functions of keys.

paper (REP, methods §6.2)       L = −mean_s (k̂_s/‖k̂_s‖)·t + α·mean (k̂_κ − κ)²
calibrated (methods §17)        L = mean_s (1 − ρ(k̂_s))² + λ·mean_s ‖k̂_s − k_s‖²/‖k_s‖² + α·mean (k̂_κ − κ)²
                                    − mean_s log g(k_s) − w·mean_n log(1 − g(k_n))

ρ(k) = k·response is the fraction of the edit that the key k retrieves, so that 1 is what every form of the subject
should have. The paper's similarity grows without bound and its gate never sees what it must leave alone. Training takes
the calibrated loss and its gradient from `calibrated_step`; the definition here is what that is tested against.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear, softplus

from rep_fast.ops import AdapterWeights, gate_logits


def soft_adapted(keys: Tensor, weights: AdapterWeights, *, entering: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The training form k̂ = k + σ(z)·B A k and the gate logits z.

    Args:
        keys: [s, M]. entering: [s, M], what A reads instead, as after dropout.
    Returns:
        k̂ [s, M], z [s], differentiable in the weights.
    """
    logits = gate_logits(keys, weights)
    projected = linear(linear(keys if entering is None else entering, weights.a), weights.b)
    return keys + logits.sigmoid()[:, None] * projected, logits


def protecting(weights: AdapterWeights, basis: Tensor) -> AdapterWeights:
    """The adapter with the rows of A orthogonal to an orthonormal `basis` [M, p]: it moves no key of that span.

    With the keys of the edited prompt's tokens in the span, that prompt is answered exactly as without the adapter,
    whatever B and the gate are, and L_cons = 0 holds by construction instead of by weight.
    """
    return weights._replace(a=weights.a - (weights.a @ basis) @ basis.T)


def consistency(adapted_anchor: Tensor, anchor: Tensor) -> Tensor:
    """L_cons: mean over the M entries of (k̂_κ − κ)²."""
    return (adapted_anchor - anchor).square().mean()


def paper_loss(
    adapted: Tensor, target: Tensor, adapted_anchor: Tensor, anchor: Tensor, *, alpha: float, absolute: bool = False
) -> Tensor:
    """L_agg + α·L_cons (methods §6.2).

    Args:
        adapted: k̂ [s, M]. target: t [M], u = C⁻¹k*/‖C⁻¹k*‖ by default. adapted_anchor, anchor: [M].
    """
    similarity = (adapted / adapted.norm(dim=1, keepdim=True)) @ target
    agreement = similarity.abs() if absolute else similarity
    return -agreement.mean() + alpha * consistency(adapted_anchor, anchor)


def calibrated_loss(
    adapted: Tensor,
    keys: Tensor,
    logits: Tensor,
    negative_logits: Tensor,
    adapted_anchor: Tensor,
    anchor: Tensor,
    response: Tensor,
    *,
    alpha: float,
    response_target: float,
    response_weight: float,
    shift_weight: float,
    negative_weight: float,
) -> Tensor:
    """The calibrated objective (methods §17).

    Args:
        adapted, keys: k̂_s and k_s [s, M]. logits [s], negative_logits [n]: gate logits. anchor: [M].
        response: [M] with ρ(k) = k·response, in the editor's own normalisation. response_target: wanted ρ.
    """
    rho = adapted @ response
    shift = (adapted - keys).square().sum(dim=1) / keys.square().sum(dim=1)
    gate = softplus(-logits).mean() + negative_weight * softplus(negative_logits).mean()
    return (
        response_weight * (response_target - rho).square().mean()
        + shift_weight * shift.mean()
        + alpha * consistency(adapted_anchor, anchor)
        + gate
    )
