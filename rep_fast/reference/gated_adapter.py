"""The gated key adapter, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu

Weights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def gate_logits(keys: Tensor, weights: Weights) -> Tensor:
    """z = w₂ᵀ GELU(W₁k + b₁) + b₂ for every row, [T] float64."""
    _, _, w1, b1, w2, b2 = (tensor.double() for tensor in weights)
    hidden = keys.double() @ w1.T + b1  # [T, H]
    return gelu(hidden) @ w2 + b2  # [T]


def projection(keys: Tensor, weights: Weights) -> Tensor:
    """π(k) = B(Ak), [T, M] float64."""
    return keys.double() @ weights[0].double().T @ weights[1].double().T


def gated_adapter(
    keys: Tensor, adapters: Sequence[Weights], *, tau: Sequence[float], gate: str = "hard", compose: str = "chain"
) -> Tensor:
    """Adapted keys [T, M] float64; arguments as in the op, `adapters` always a sequence."""
    if gate == "soft":
        opening = torch.sigmoid(gate_logits(keys, adapters[0])).unsqueeze(1)  # [T, 1]
        return keys.double() + opening * projection(keys, adapters[0])
    bounds = [_logit(value) for value in tau]
    adapted = []
    for key in keys.double()[:, None]:  # [1, M]
        if compose == "chain":
            current = key
            for weights, bound in zip(adapters, bounds, strict=True):
                if float(gate_logits(current, weights)) > bound:
                    current = current + projection(current, weights)
            adapted.append(current)
            continue
        logits = [float(gate_logits(key, weights)) for weights in adapters]
        fired = [i for i, (z, bound) in enumerate(zip(logits, bounds, strict=True)) if z > bound]
        if compose == "argmax":
            fired = sorted(fired, key=lambda i: -logits[i])[:1]
        adapted.append(key + sum((projection(key, adapters[i]) for i in fired), torch.zeros_like(key)))
    return torch.cat(adapted) if adapted else keys.double()


def _logit(tau: float) -> float:
    if tau in (0.0, 1.0):
        return math.inf if tau else -math.inf
    return math.log(tau / (1.0 - tau))
