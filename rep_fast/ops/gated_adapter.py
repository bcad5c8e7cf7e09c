"""The gated key adapter of REP: a key is moved only where a small gate network says so.

k̂ = k + 1[σ(w₂ᵀ GELU(W₁k + b₁) + b₂) > τ] · B(A k) (REP, methods §6.1). The comparison is made on logits, σ being
monotone. Inference uses the hard gate, training the soft one. On a GPU kernels decide and apply the hard gates
(`rep_fast.ops.gates_on_gpu`), training is torch's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.nn.functional import gelu, linear

from rep_fast.errors import HparamError, NonFiniteError
from rep_fast.ops import native
from rep_fast.ops.backend import Backend, choose_or_warn
from rep_fast.ops.changed_rows import ChangedRows
from rep_fast.ops.gate_gradient import dense_rows, gate_forward
from rep_fast.ops.gates_on_gpu import gates_on_gpu
from rep_fast.ops.profile import recorded

COMPOSITIONS = ("chain", "argmax", "sum")
GATES = ("hard", "soft")
_NAME = "gated_adapter"
_KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# tokens whose gate activations are alive at once in the torch body
_TILE_TOKENS = 512


class AdapterWeights(NamedTuple):
    """Weights of one adapter, all float32 (default), bfloat16 or float64, on one device.

    Shapes: a [r, M], b [M, r], w1 [H, M], b1 [H], w2 [H], b2 [1].
    """

    a: Tensor
    b: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    @property
    def key_dim(self) -> int:
        """M, the key width."""
        return self.a.shape[1]


def gated_adapter(
    keys: Tensor,
    adapters: AdapterWeights | Sequence[AdapterWeights],
    *,
    tau: float | Sequence[float] = 0.9,
    gate: str = "hard",
    compose: str = "chain",
) -> Tensor:
    """Keys after the gated adapters.

    k̂ = k + 1[z(k) > log(τ/(1−τ))]·B(Ak) with z(k) = w₂ᵀGELU(W₁k + b₁) + b₂, exact GELU (REP, methods §6.1, §6.5).
    Several adapters compose as
      chain    k ← k + 1[g_i(k) > τ_i] π_i(k) in the given order; later gates see the key as it is by then
      argmax   gates see the native key; of those open, the largest logit acts (equal logits: the first)
      sum      gates see the native key; the projections of all open ones are added

    Args:
        keys: [T, M] float32, bfloat16, float16 or float64; rows may be padded, T may be 0. Arithmetic is float32
            (float64 when keys or weights are), rounded to the keys' dtype once at the end.
        adapters: one adapter or several in edit order; weights on the keys' device.
        tau: gate threshold in [0, 1], one for all or one each; 0 opens always, 1 never.
        gate: "hard", or "soft" for k + σ(z)·B(Ak), differentiable in keys and weights (one adapter, training).
        compose: "chain", "argmax" or "sum".
    Returns:
        [T, M], dtype of `keys`. With the hard gate, rows where every gate is shut are bitwise those of `keys`, and
        gradients flow to keys, a and b as if the gate decisions were constants.
    Raises:
        HparamError: shapes, dtypes, devices, τ, gate or compose out of range.
        NonFiniteError: a gate logit is NaN or infinite (CPU).
    """
    chosen = [adapters] if isinstance(adapters, AdapterWeights) else list(adapters)
    thresholds = _thresholds(tau, len(chosen))
    if gate not in GATES:
        raise HparamError(f"gated_adapter: gate must be one of {', '.join(GATES)}, got {gate!r}")
    if compose not in COMPOSITIONS:
        raise HparamError(f"gated_adapter: compose must be one of {', '.join(COMPOSITIONS)}, got {compose!r}")
    _check(keys, chosen)
    if gate == "soft":
        if len(chosen) != 1:
            raise HparamError(f"gated_adapter: the soft gate takes one adapter, got {len(chosen)}")
        return _soft(keys, chosen[0])
    weights = [tensor for adapter in chosen for tensor in adapter]
    return torch.ops.rep_fast.gated_adapter(keys, weights, thresholds, compose)[0]


def gate_logits(keys: Tensor, adapter: AdapterWeights) -> Tensor:
    """Logits z(k) = w₂ᵀGELU(W₁k + b₁) + b₂ of one gate, the numbers the hard gate compares.

    Args:
        keys: [T, M] as for `gated_adapter`.
    Returns:
        [T] float32 (float64 when keys or weights are), differentiable in keys and weights.
    Raises:
        HparamError: as `gated_adapter`.
    """
    _check(keys, [adapter])
    dtype = _compute_dtype(keys, adapter)
    if torch.is_grad_enabled() and (keys.requires_grad or any(tensor.requires_grad for tensor in adapter)):
        return _recorded_logits(keys.to(dtype), adapter, dtype)
    return torch.ops.rep_fast.gate_logits(keys, list(adapter))


def _thresholds(tau: float | Sequence[float], n_adapters: int) -> list[float]:
    """log(τ/(1−τ)) per adapter."""
    if n_adapters == 0:
        raise HparamError("gated_adapter: no adapter given; pass at least one AdapterWeights")
    taus = [float(tau)] * n_adapters if isinstance(tau, (int, float)) else [float(value) for value in tau]
    if len(taus) != n_adapters:
        raise HparamError(f"gated_adapter: {len(taus)} values of tau for {n_adapters} adapters")
    for value in taus:
        if not 0.0 <= value <= 1.0:
            raise HparamError(f"gated_adapter: tau must lie in [0, 1], got {value}")
    return [_logit(value) for value in taus]


def _logit(tau: float) -> float:
    if tau in (0.0, 1.0):
        return math.inf if tau else -math.inf
    return math.log(tau / (1.0 - tau))


def _check(keys: Tensor, adapters: Sequence[AdapterWeights]) -> None:
    if keys.dim() != 2 or keys.shape[1] == 0 or keys.dtype not in _KEY_DTYPES:
        raise HparamError(
            "gated_adapter: keys must be (tokens, width) float32|bfloat16|float16|float64,"
            f" got {tuple(keys.shape)} {keys.dtype}"
        )
    M = keys.shape[1]
    for number, adapter in enumerate(adapters):
        r, H = adapter.a.shape[0], adapter.w1.shape[0]
        wanted = {"a": (r, M), "b": (M, r), "w1": (H, M), "b1": (H,), "w2": (H,), "b2": (1,)}
        for name, shape in wanted.items():
            tensor: Tensor = getattr(adapter, name)
            if tensor.shape != shape:
                raise HparamError(
                    f"gated_adapter: {name} of adapter {number} must be {shape} for keys of width {M},"
                    f" got {tuple(tensor.shape)}"
                )
            if tensor.dtype not in _WEIGHT_DTYPES or tensor.dtype != adapter.a.dtype or tensor.device != keys.device:
                raise HparamError(
                    f"gated_adapter: {name} of adapter {number} must be one of float32|bfloat16|float64, the dtype of a"
                    f" and on {keys.device}, got {tensor.dtype} on {tensor.device}"
                )


def _compute_dtype(keys: Tensor, adapter: AdapterWeights) -> torch.dtype:
    return torch.float64 if torch.float64 in (keys.dtype, adapter.a.dtype) else torch.float32


def _logits(keys: Tensor, adapter: AdapterWeights, dtype: torch.dtype) -> Tensor:
    hidden = linear(keys, adapter.w1.to(dtype), adapter.b1.to(dtype))  # [T, H]
    return gelu(hidden) @ adapter.w2.to(dtype) + adapter.b2.to(dtype)


def _recorded_logits(keys: Tensor, adapter: AdapterWeights, dtype: torch.dtype) -> Tensor:
    """The same for training, with a gradient."""
    return gate_forward(keys, *(part.to(dtype) for part in adapter[2:]))[0]


def _projected(keys: Tensor, adapter: AdapterWeights, dtype: torch.dtype) -> Tensor:
    return linear(linear(keys.to(dtype), adapter.a.to(dtype)), adapter.b.to(dtype))


def _soft(keys: Tensor, adapter: AdapterWeights) -> Tensor:
    dtype = _compute_dtype(keys, adapter)
    wide = keys.to(dtype)
    opening = torch.sigmoid(_recorded_logits(wide, adapter, dtype)).unsqueeze(1)  # [T, 1]
    return (wide + opening * _projected(wide, adapter, dtype)).to(keys.dtype)


def _unflatten(weights: Sequence[Tensor]) -> list[AdapterWeights]:
    return [AdapterWeights(*weights[i : i + 6]) for i in range(0, len(weights), 6)]


# Library.define, not custom_op: this one is called per layer and generated token, where 6 µs a call count
_library = library.Library("rep_fast", "FRAGMENT")
_library.define("gated_adapter(Tensor keys, Tensor[] weights, float[] thresholds, str compose) -> (Tensor, Tensor)")
_library.define("gate_logits(Tensor keys, Tensor[] weights) -> Tensor")


def _forward(
    keys: Tensor, weights: Sequence[Tensor], thresholds: Sequence[float], compose: str
) -> tuple[Tensor, Tensor]:
    """Adapted keys [T, M] and which gates were open [E, T] bool."""
    adapters = _unflatten(weights)
    chosen = _body(keys, adapters)
    flops = sum(2 * keys.shape[0] * adapter.w1.numel() for adapter in adapters)
    traffic = 2 * keys.nbytes + sum(adapter.w1.nbytes for adapter in adapters)
    with recorded(_NAME, chosen.name, flops=flops, bytes=traffic, device=keys.device):
        if chosen.module is not None and chosen.is_cuda:
            bounds = [_rounded(value, torch.float32) for value in thresholds]
            adapted, _, opened = gates_on_gpu(chosen.module, keys, adapters, bounds, compose)
            return adapted, opened
        gates = _Gates.of(keys, adapters, thresholds, chosen, ranked=compose == "argmax")
        if not gates.any_open:
            gates.check_finite()
            return keys.clone(memory_format=torch.contiguous_format), gates.opened
        if compose == "argmax":
            confident = torch.where(gates.opened, gates.logits, -math.inf).argmax(0)  # first of equals
            gates.opened &= torch.arange(len(adapters), device=keys.device).unsqueeze(1) == confident
        changed = ChangedRows(keys, _widest(keys, adapters))
        _add_open(keys, adapters, thresholds, gates, changed, chosen, chained=compose == "chain")
        gates.check_finite()
        return changed.merged(), gates.opened


def _add_open(
    keys: Tensor,
    adapters: Sequence[AdapterWeights],
    thresholds: Sequence[float],
    gates: _Gates,
    changed: ChangedRows,
    chosen: Backend,
    *,
    chained: bool,
) -> None:
    """Add each adapter's projection to the rows where its gate is open.

    Chained adapters see a row as it is by then, so the gates after one that fired decide again for its rows.
    """
    for number, adapter in enumerate(adapters):
        rows = gates.opened[number].nonzero().squeeze(1)
        if not rows.numel():
            continue
        source = changed.current(rows) if chained else keys[rows]
        changed.add(rows, _moved(source, adapter, _compute_dtype(keys, adapter), chosen))
        if chained and number + 1 < len(adapters):
            later = slice(number + 1, None)
            gates.renew(later, rows, changed.current(rows), adapters[later], thresholds[later], chosen)


def _body(keys: Tensor, adapters: Sequence[AdapterWeights]) -> Backend:
    if _widest(keys, adapters) == torch.float64:
        return Backend("reference", "float64 arithmetic is torch's")
    return choose_or_warn(_NAME, keys.device)


def _widest(keys: Tensor, adapters: Sequence[AdapterWeights]) -> torch.dtype:
    wide = any(_compute_dtype(keys, adapter) == torch.float64 for adapter in adapters)
    return torch.float64 if wide else torch.float32


@dataclass
class _Gates:
    """Decisions of all hard gates: logits [E, T] (0 where a threshold of ±∞ needs none), opened [E, T] bool.

    any_open: false where surely no gate is open; on a GPU it is always true, reading it would wait for the device.
    all_finite: likewise false on a GPU.
    """

    logits: Tensor
    opened: Tensor
    any_open: bool
    all_finite: bool

    @classmethod
    def of(
        cls,
        keys: Tensor,
        adapters: Sequence[AdapterWeights],
        thresholds: Sequence[float],
        chosen: Backend,
        *,
        ranked: bool = False,
    ) -> _Gates:
        """All gates on the same keys; `ranked` gates need their logits even where they are always open."""
        bounds = [_rounded(value, _compute_dtype(keys, a)) for value, a in zip(thresholds, adapters, strict=True)]
        asked = [i for i, value in enumerate(bounds) if math.isfinite(value) or (ranked and value < 0)]
        found, all_finite, n_open = _run_gates(keys, [adapters[i] for i in asked], [bounds[i] for i in asked], chosen)
        logits = found
        if len(asked) < len(adapters):
            logits = found.new_zeros(len(adapters), keys.shape[0])
            logits[asked] = found
            n_open += sum(value < 0 for value in bounds)
        if n_open == 0:
            return cls(logits, torch.zeros_like(logits, dtype=torch.bool), False, all_finite)
        opened = logits > torch.tensor(bounds, dtype=logits.dtype, device=logits.device).unsqueeze(1)
        return cls(logits, opened, True, all_finite)

    def renew(
        self,
        later: slice,
        rows: Tensor,
        keys: Tensor,
        adapters: Sequence[AdapterWeights],
        thresholds: Sequence[float],
        chosen: Backend,
    ) -> None:
        """The gates `later` decide again for `rows`, whose keys were changed."""
        again = _Gates.of(keys, adapters, thresholds, chosen)
        self.logits[later, rows] = again.logits.to(self.logits.dtype)  # none asked for (τ of 0 or 1) has float32
        self.opened[later, rows] = again.opened
        self.all_finite &= again.all_finite

    def check_finite(self) -> None:
        """Raises NonFiniteError (CPU) with the first row of a logit that counted and is not finite."""
        if self.all_finite or self.logits.device.type != "cpu":
            return
        bad = (~torch.isfinite(self.logits)).nonzero()
        if bad.numel():
            gate, row = bad[0].tolist()
            value = float(self.logits[gate, row])
            raise NonFiniteError(f"gated_adapter: the gate logit of row {row} is {value}; check the keys")


def _rounded(threshold: float, dtype: torch.dtype) -> float:
    """The bound in the logits' precision, so that a logit stored as log(τ/(1−τ)) equals it: closed."""
    return threshold if dtype == torch.float64 else struct.unpack("f", struct.pack("f", threshold))[0]


def _run_gates(
    keys: Tensor, adapters: Sequence[AdapterWeights], bounds: Sequence[float], chosen: Backend
) -> tuple[Tensor, bool, int]:
    """Logits [E, T], whether all are finite, and how many lie above their bound (on a GPU: false, and all)."""
    if chosen.module is None:
        logits = _plain_logits(keys, adapters)
        if keys.device.type != "cpu":
            return logits, False, logits.numel()
        above = logits > torch.tensor(bounds, dtype=logits.dtype).unsqueeze(1)
        return logits, bool(torch.isfinite(logits).all()), int(above.sum())
    logits = torch.empty(len(adapters), keys.shape[0])
    weights = []
    for adapter in adapters:
        weights += [dense_rows(adapter.w1), *(part.float().contiguous() for part in adapter[3:])]
    all_finite, n_open = chosen.module.gate_logits(
        dense_rows(keys), weights, bounds, logits, chosen.level, native.n_threads()
    )
    return logits, all_finite, n_open


def _plain_logits(keys: Tensor, adapters: Sequence[AdapterWeights]) -> Tensor:
    logits = keys.new_empty(len(adapters), keys.shape[0], dtype=_widest(keys, adapters))
    for row, adapter in zip(logits, adapters, strict=True):
        dtype = _compute_dtype(keys, adapter)
        for tile, out in zip(keys.split(_TILE_TOKENS), row.split(_TILE_TOKENS), strict=True):
            out.copy_(_logits(tile.to(dtype), adapter, dtype))
    return logits


def _moved(rows: Tensor, adapter: AdapterWeights, dtype: torch.dtype, chosen: Backend) -> Tensor:
    """B(A k) of a few rows."""
    if chosen.module is None:
        return _projected(rows, adapter, dtype)
    inner = torch.empty(rows.shape[0], adapter.a.shape[0])
    outer = torch.empty(rows.shape[0], adapter.b.shape[0])
    for source, weight, product in ((dense_rows(rows), adapter.a, inner), (inner, adapter.b, outer)):
        chosen.module.dot_products(source, dense_rows(weight), product, chosen.level, native.n_threads())
    return outer


def _fake(keys: Tensor, weights: Sequence[Tensor], thresholds: Sequence[float], compose: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(keys, memory_format=torch.contiguous_format), keys.new_empty(
        (len(thresholds), keys.shape[0]), dtype=torch.bool
    )


def _forward_logits(keys: Tensor, weights: Sequence[Tensor]) -> Tensor:
    adapters = _unflatten(weights)
    chosen = _body(keys, adapters)
    if chosen.module is not None and chosen.is_cuda:
        return gates_on_gpu(chosen.module, keys, adapters, [math.inf], "sum")[1][0]
    return _run_gates(keys, adapters, [math.inf], chosen)[0][0]


def _fake_logits(keys: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return keys.new_empty(keys.shape[0], dtype=_compute_dtype(keys, _unflatten(weights)[0]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    keys, weights, _, compose = inputs
    ctx.save_for_backward(keys, output[1], *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.compose = compose


def _backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    """Gradients with the gate decisions held constant, by autograd over the open projections alone."""
    keys, opened, *weights = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (keys, *weights)]
        current = native = leaves[0]
        for number, adapter in enumerate(_unflatten(leaves[1:])):
            source = current if ctx.compose == "chain" else native
            rows = opened[number].nonzero().squeeze(1)
            moved = _projected(source[rows], adapter, _compute_dtype(keys, adapter))
            dtype = torch.promote_types(moved.dtype, current.dtype)
            current = current.to(dtype).index_add(0, rows, moved.to(dtype))
        gradients = torch.autograd.grad(current, leaves, upstream.to(current.dtype), allow_unused=True)
    return gradients[0], list(gradients[1:]), None, None


_library.impl("gated_adapter", _forward, "CPU")
_library.impl("gated_adapter", _forward, "CUDA")
_library.impl("gate_logits", _forward_logits, "CPU")
_library.impl("gate_logits", _forward_logits, "CUDA")
library.register_fake("rep_fast::gated_adapter", _fake, lib=_library)
library.register_fake("rep_fast::gate_logits", _fake_logits, lib=_library)
library.register_autograd("rep_fast::gated_adapter", _backward, setup_context=_remember, lib=_library)
