"""The second moment beside what one would write without it: products in torch, NumPy, BLAS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.linalg import blas
from torch import Tensor

from rep_fast.bench.cases import MOMENT_CASES, MomentCase
from rep_fast.bench.interleaved import Provider
from rep_fast.bench.levels import timed_levels
from rep_fast.ops import MomentSum, accumulate_moment

CASES = MOMENT_CASES
_CHECKED_ROWS = 32


@dataclass(frozen=True)
class Inputs:
    """keys [T, M] bfloat16; our float64 sum and the peers' float32 one, shared by all of each: only one exists of each.

    The float64 answer is known for a few rows of the triangle.
    """

    case: MomentCase
    keys: Tensor
    total: MomentSum
    float32: Tensor
    rows: Tensor

    @classmethod
    def draw(cls, case: MomentCase, *, seed: int) -> Inputs:
        """Standard normal keys, fresh for each seed."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(case.n_tokens, case.key_dim, generator=generator).bfloat16()
        rows = torch.randint(case.key_dim, (_CHECKED_ROWS,), generator=generator)
        return cls(case, keys, MomentSum.zeros(case.key_dim), torch.zeros(case.key_dim, case.key_dim), rows)

    def is_exact(self, lower: Tensor) -> bool:
        """Whether a triangle is that of float64 up to the rounding of float32 additions."""
        wide = self.keys.double()
        picked = wide[:, self.rows]
        below = torch.arange(self.case.key_dim) <= self.rows.unsqueeze(1)
        error = (lower[self.rows].double() - picked.T @ wide).abs()
        bound = (self.case.n_tokens + 1) * 2.0**-24 * (picked.abs().T @ wide.abs())
        return bool((error <= bound)[below].all())


def providers(inputs: Inputs) -> list[Provider]:
    """Ours at every level, with the products that are faster here and with those of bfloat16, then the peers.

    Peers overwrite a float32 sum, which is less than ours does: it adds to a float64 one.
    """
    ours = []
    for name in timed_levels("accumulate_moment"):
        dtype = "bf16" if name == "avx512_bf16" else "fp32"
        ours.append(Provider(f"rep_fast {name} {dtype}", dtype, _ours(inputs, dtype), True, name))
    return [
        *ours,
        Provider("torch float32 addmm", "fp32", partial(_torch_float32, inputs)),
        Provider("torch bfloat16 matmul", "bf16", partial(_torch_bfloat16, inputs)),
        Provider("numpy float32 matmul", "fp32", partial(_numpy, inputs)),
        Provider("scipy ssyrk", "fp32", partial(_ssyrk, inputs)),
    ]


def _ours(inputs: Inputs, precision: str) -> Callable[[], Tensor]:
    is_first = True

    def run() -> Tensor:
        nonlocal is_first
        if is_first:  # the sum of the warm-up is the one that is checked
            inputs.total.lower.zero_()
            is_first = False
        return accumulate_moment(inputs.total, inputs.keys, precision=precision).lower

    return run


def _torch_float32(inputs: Inputs) -> Tensor:
    wide = inputs.keys.float()
    return inputs.float32.addmm_(wide.T, wide, beta=0.0)


def _torch_bfloat16(inputs: Inputs) -> Tensor:
    return inputs.keys.T @ inputs.keys


def _numpy(inputs: Inputs) -> Tensor:
    wide = inputs.keys.float().numpy()
    return torch.from_numpy(np.matmul(wide.T, wide, out=inputs.float32.numpy()))


def _ssyrk(inputs: Inputs) -> Tensor:
    wide = inputs.keys.float().numpy()
    # row-major keys are LAPACK's transposed ones, and the row-major lower triangle its upper one
    blas.ssyrk(1.0, wide.T, beta=0.0, c=inputs.float32.numpy().T, overwrite_c=1, lower=0)
    return inputs.float32
