"""What the tests of the gated adapter share: inputs, error bounds, rows whose gates no rounding can turn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rep_fast.ops import AdapterWeights
from rep_fast.reference import gated_adapter as reference

KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# half a unit in the last place, relative
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def random_adapter(M: int, H: int, *, r: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, dtype=torch.float64, generator=generator) * size).to(dtype)

    root = M**-0.5
    return AdapterWeights(
        a=draw(r, M, size=root), b=draw(M, r), w1=draw(H, M, size=root), b1=draw(H), w2=draw(H), b2=draw(1)
    )


def random_keys(T: int, M: int, *, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    return torch.randn(T, M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def logit_bound(keys: Tensor, adapter: AdapterWeights) -> Tensor:
    """Float32 error of a logit: (M + 4)·2⁻²⁴ of |W₁||k| + |b₁| through GELU (|GELU'| ≤ 1.13), and 8·2⁻²⁴ of each GELU,
    summed with |w₂|; plain torch also sums H terms in float32."""
    wide, w1, b1, w2 = keys.double(), adapter.w1.double(), adapter.b1.double(), adapter.w2.double()
    inner = wide.abs() @ w1.abs().T + b1.abs()
    activation = torch.nn.functional.gelu(wide @ w1.T + b1).abs()
    relative = (keys.shape[1] + 4) * 1.13 * inner + (8 + adapter.w1.shape[0]) * activation
    return 2.0**-24 * (relative @ w2.abs() + adapter.b2.double().abs() + 1)


def rows_with_clear_gates(
    keys: Tensor, adapters: Sequence[AdapterWeights], tau: Sequence[float], compose: str
) -> Tensor:
    clear = torch.ones(len(keys), dtype=torch.bool)
    current = keys.double()
    logits = []
    for weights, value in zip(adapters, tau, strict=True):
        z = reference.gate_logits(current, weights)
        bound = math.log(value / (1 - value))
        clear &= (z - bound).abs() > 1e-3
        logits.append(z)
        if compose == "chain":
            current = current + (z > bound).unsqueeze(1) * reference.projection(current, weights)
    if compose == "argmax":
        two = torch.stack(logits).topk(2, dim=0).values
        clear &= two[0] - two[1] > 1e-3
    return clear


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)
