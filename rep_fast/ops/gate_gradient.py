"""The gate of `gated_adapter` for training: logits with what their gradient needs, and that gradient.

With x = W₁k + b₁, z = w₂ᵀGELU(x) + b₂ and d = ∂L/∂z: ∂L/∂x = d·w₂·GELU′(x), ∂L/∂W₁ = Σ_t (∂L/∂x_t) k_tᵀ,
∂L/∂b₁ = Σ_t ∂L/∂x_t, ∂L/∂w₂ = Σ_t d_t GELU(x_t), ∂L/∂b₂ = Σ_t d_t, ∂L/∂k = W₁ᵀ ∂L/∂x. Native for float32 on the CPU,
plain torch otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.nn.functional import gelu, linear

from rep_fast.ops import native
from rep_fast.ops.backend import Backend, choose

_NAME = "gated_adapter"


class GateGradient(NamedTuple):
    """∂L/∂ of a gate's weights, w1 [H, M], b1 [H], w2 [H], and of its hidden layer, d_hidden [T, H]."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    d_hidden: Tensor


def gate_forward(keys: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Logits z of one gate and its hidden layer x = W₁k + b₁, before GELU.

    Args:
        keys: [T, M] float32 or float64; w1 [H, M], b1 [H], w2 [H], b2 [1] of the same dtype and device.
    Returns:
        logits [T], differentiable in everything; hidden [T, H], not differentiable.
    """
    return torch.ops.rep_fast.gate_forward(keys, w1, b1, w2, b2)


def gate_gradient(keys: Tensor, hidden: Tensor, w2: Tensor, d_logits: Tensor) -> GateGradient:
    """The gradients of Σ_t d_t z_t, from what `gate_forward` returned; d_logits [T]."""
    return GateGradient(*torch.ops.rep_fast.gate_gradient(keys, hidden, w2, d_logits))


_library = library.Library("rep_fast", "FRAGMENT")
_library.define("gate_forward(Tensor keys, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> (Tensor, Tensor)")
_library.define(
    "gate_gradient(Tensor keys, Tensor hidden, Tensor w2, Tensor d_logits) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _body(keys: Tensor) -> Backend:
    if keys.dtype != torch.float32:
        return Backend("reference", "only float32 has a native body")
    chosen = choose(_NAME, keys.device)
    return Backend("reference", "training has native bodies on the CPU alone") if chosen.is_cuda else chosen


def dense_rows(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous, else a copy."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _forward(keys: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    chosen = _body(keys)
    if chosen.module is None:
        hidden = linear(keys, w1, b1)
        return gelu(hidden) @ w2 + b2, hidden
    logits, hidden = keys.new_empty(1, keys.shape[0]), keys.new_empty(keys.shape[0], w1.shape[0])
    chosen.module.gate_forward(
        dense_rows(keys), dense_rows(w1), b1.contiguous(), w2.contiguous(), float(b2), logits, hidden, chosen.level,
        native.n_threads(),
    )  # fmt: skip
    return logits[0], hidden


def _gradient(keys: Tensor, hidden: Tensor, w2: Tensor, d_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = _body(keys)
    if chosen.module is None:
        d_hidden = torch.ops.aten.gelu_backward(d_logits.unsqueeze(1) * w2, hidden)
        return d_hidden.T @ keys, d_hidden.sum(dim=0), d_logits @ gelu(hidden), d_hidden
    d_w1, d_b1, d_w2, d_hidden = _fake_gradient(keys, hidden, w2, d_logits)
    chosen.module.gate_gradient(
        dense_rows(keys), dense_rows(hidden), w2.contiguous(), d_logits.contiguous(), d_w1, d_b1, d_w2, d_hidden,
        chosen.level, native.n_threads(),
    )  # fmt: skip
    return d_w1, d_b1, d_w2, d_hidden


def _fake_forward(keys: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    return keys.new_empty(keys.shape[0]), keys.new_empty(keys.shape[0], w1.shape[0])


def _fake_gradient(keys: Tensor, hidden: Tensor, w2: Tensor, d_logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (_, M), (T, H) = keys.shape, hidden.shape
    return keys.new_empty(H, M), keys.new_empty(H), keys.new_empty(H), keys.new_empty(T, H)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    keys, w1, _, w2, _ = inputs
    ctx.save_for_backward(keys, w1, w2, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    keys, w1, w2, hidden = ctx.saved_tensors
    found = gate_gradient(keys, hidden, w2, upstream)
    d_keys = found.d_hidden @ w1 if ctx.needs_input_grad[0] else None
    return d_keys, found.w1, found.b1, found.w2, upstream.sum().unsqueeze(0)


_library.impl("gate_forward", _forward, "CPU")
_library.impl("gate_forward", _forward, "CUDA")
_library.impl("gate_gradient", _gradient, "CPU")
_library.impl("gate_gradient", _gradient, "CUDA")
library.register_fake("rep_fast::gate_forward", _fake_forward, lib=_library)
library.register_fake("rep_fast::gate_gradient", _fake_gradient, lib=_library)
library.register_autograd("rep_fast::gate_forward", _backward, setup_context=_remember, lib=_library)
