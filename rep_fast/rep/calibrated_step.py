"""Loss and gradient of the calibrated objective, written out.

Training an adapter takes a hundred steps on some three hundred short vectors: recording them for automatic
differentiation costs more than the arithmetic, and so do forty operations of torch, so that float32 on the CPU has a
native body. `objectives.calibrated_loss` is the definition; all agree to rounding.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, softplus

from rep_fast.ops import AdapterWeights, native
from rep_fast.ops.backend import choose
from rep_fast.rep.hparams import RepHparams


def calibrated_step(
    weights: AdapterWeights,
    keys: Tensor,
    negatives: Tensor,
    response: Tensor,
    hparams: RepHparams,
    *,
    entering: Tensor,
) -> tuple[Tensor, AdapterWeights]:
    """L and ∂L/∂weights (methods §17).

    Args:
        weights: of the adapter, wanting no gradient; not changed.
        keys: [s + 1, M], the positives and, last, the anchor. negatives: [n, M]; s and n at least 1.
        response: [M] with ρ(k) = k·response.
        entering: [s + 1, M], what A reads in place of `keys`: after dropout, and without the protected span.
    Returns:
        The loss (0-d) and the gradients, one per weight and of its shape.
    Cost: 4·(s + n)·M·H + 4·s·M·r multiplications and some forty operations.
    """
    everything = torch.cat([keys, negatives])
    if keys.dtype == torch.float32:
        chosen = choose("gated_adapter", keys.device)
        if chosen.module is not None and not chosen.is_cuda:
            return _native(chosen.module, chosen.level, weights, everything, response, hparams, entering)
    return _written_out(weights, everything, response, hparams, entering)


def _native(
    module: ModuleType,
    level: int,
    weights: AdapterWeights,
    everything: Tensor,
    response: Tensor,
    hparams: RepHparams,
    entering: Tensor,
) -> tuple[Tensor, AdapterWeights]:
    gradients = AdapterWeights(*(torch.empty_like(part) for part in weights))
    loss = module.calibrated_step(
        everything, entering, response, list(weights), list(gradients), hparams.response_target,
        hparams.response_weight, hparams.shift_weight, hparams.consistency, hparams.negative_weight, level,
        native.n_threads(),
    )  # fmt: skip
    return torch.tensor(loss), gradients


def _written_out(
    weights: AdapterWeights, everything: Tensor, response: Tensor, hparams: RepHparams, entering: Tensor
) -> tuple[Tensor, AdapterWeights]:
    s = len(entering) - 1
    n = len(everything) - len(entering)
    keys = everything[: s + 1]
    hidden = torch.addmm(weights.b1, everything, weights.w1.T)
    activated = gelu(hidden)
    logits = activated @ weights.w2 + weights.b2
    gate = logits.sigmoid()
    opened = gate[: s + 1]

    # π(k) = B p with p = A k enters only through p·(Bᵀ response) and ‖B p‖² = pᵀ(BᵀB)p
    p = linear(entering, weights.a)
    toward = weights.b.T @ response
    p_gram = p @ (weights.b.T @ weights.b)
    squares = (p_gram * p).sum(dim=1)
    retrieved = p @ toward
    excess = opened[:s] * retrieved[:s] + (keys[:s] @ response - hparams.response_target)

    # weight of gate²·‖B p‖² in the loss: the shift of a positive, the consistency of the anchor
    per_square = hparams.shift_weight / s / keys.square().sum(dim=1)
    per_square[s] = hparams.consistency / keys.shape[1]
    moved = per_square * opened
    loss = (
        hparams.response_weight / s * excess.dot(excess)
        + (moved * opened).dot(squares)
        + softplus(-logits[:s]).mean()
        + hparams.negative_weight * softplus(logits[s + 1 :]).mean()
    )

    d_excess = (2 * hparams.response_weight / s) * excess
    d_gate = 2 * moved * squares
    d_gate[:s] += d_excess * retrieved[:s]
    d_logits = torch.cat([d_gate * opened * (1 - opened), gate[s + 1 :] * (hparams.negative_weight / n)])
    d_logits[:s] += (opened[:s] - 1) / s
    d_retrieved = d_excess * opened[:s]
    d_squares = (moved * opened)[:, None]
    d_p = 2 * d_squares * p_gram
    d_p[:s] += d_retrieved[:, None] * toward
    d_gram = p.T @ (d_squares * p)
    d_hidden = torch.ops.aten.gelu_backward(d_logits[:, None] * weights.w2, hidden)
    gradients = AdapterWeights(
        a=d_p.T @ entering,
        b=torch.addmm(torch.outer(response, d_retrieved @ p[:s]), weights.b, d_gram, alpha=2.0),
        w1=d_hidden.T @ everything,
        b1=d_hidden.sum(dim=0),
        w2=d_logits @ activated,
        b2=d_logits.sum()[None],
    )
    return loss, gradients
