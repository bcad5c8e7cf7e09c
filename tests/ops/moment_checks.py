"""Keys, and the error that every GPU body of accumulate_moment may make."""

from __future__ import annotations

import torch
from torch import Tensor

from rep_fast.ops import MomentSum

HALVES = (torch.bfloat16, torch.float16)


def random_keys(n: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n)).to(dtype)


def assert_is_moment(total: MomentSum, before: Tensor, keys: Tensor) -> None:
    """Chains of 512 tokens on the tensor cores, 4096 tokens in float32: 512 · 17/16 · 2⁻²³ and 8 · 2⁻²⁴ of Σ|k_i k_j|
    on a device, which may cut every addend off; where sums alone are cut off, (512 / 16 + 16) · 2⁻²³ and the same."""
    wide = keys.double()
    error = (total.lower.cpu() - before - wide.T @ wide).tril().abs()
    units = 544 if total.lower.is_cuda else 48
    bound = (units * 2.0**-23 + 8 * 2.0**-24) * (wide.abs().T @ wide.abs()) + 2.0**-50 * before.abs()
    assert bool((error <= bound).all())
