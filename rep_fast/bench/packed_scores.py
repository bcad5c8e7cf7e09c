"""The `zabs` score beside forming the weight gradient and reducing it, in torch and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rep_fast.bench.cases import SCORE_CASES, ScoreCase
from rep_fast.bench.interleaved import Provider
from rep_fast.bench.levels import timed_levels
from rep_fast.ops import packed_scores

CASES = SCORE_CASES


@dataclass(frozen=True)
class Inputs:
    """x [T, D_in], g [T, D_out] float32, the float64 column scores and a bound on float32's error in them."""

    case: ScoreCase
    x: Tensor
    g: Tensor
    answer: Tensor
    bound: Tensor

    @classmethod
    def draw(cls, case: ScoreCase, *, seed: int) -> Inputs:
        """Standard normal numbers, fresh for each seed."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(case.n_tokens, case.d_in, generator=generator)
        g = torch.randn(case.n_tokens, case.d_out, generator=generator)
        wide, centred = x.double(), g.double() - g.double().mean(1, keepdim=True)
        # σ_i² by the gram matrix; |entry (i, j) of the product| ≤ ‖x_i‖‖g_j‖, and so is its error in units of rounding
        sigma = ((centred @ centred.T @ wide) * wide).sum(0).div(case.d_out - 1).sqrt()
        terms = (wide.norm(dim=0) / sigma).mean() * centred.norm(dim=0)
        answer = packed_scores(wide, g.double(), score="zabs", nodes="columns").columns
        return cls(case, x, g, answer, (case.n_tokens + case.d_out**0.5 + 64) * 2.0**-24 * terms)

    def is_exact(self, columns: Tensor) -> bool:
        """Whether the scores are those of float64 up to float32's rounding."""
        return bool(((columns.double() - self.answer).abs() <= self.bound).all())


def providers(inputs: Inputs) -> list[Provider]:
    """Ours at every level, then the peers, which hold the gradient."""
    ours = [
        Provider(f"rep_fast {name} fp32", "fp32", _ours(inputs), True, name) for name in timed_levels("packed_scores")
    ]
    return [
        *ours,
        Provider("torch float32, gradient formed", "fp32", partial(_torch, inputs)),
        Provider("torch bfloat16, gradient formed", "bf16", partial(_torch_bfloat16, inputs)),
        Provider("numpy float32, gradient formed", "fp32", partial(_numpy, inputs)),
    ]


def _ours(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: packed_scores(inputs.x, inputs.g, score="zabs", nodes="columns").columns


def _reduced(gradient: Tensor) -> Tensor:
    deviation = gradient.std(1, keepdim=True)
    return gradient.sub_(gradient.mean(1, keepdim=True)).div_(deviation).abs_().mean(0)


def _torch(inputs: Inputs) -> Tensor:
    return _reduced(inputs.x.T @ inputs.g)


def _torch_bfloat16(inputs: Inputs) -> Tensor:
    return _reduced((inputs.x.bfloat16().T @ inputs.g.bfloat16()).float())


def _numpy(inputs: Inputs) -> Tensor:
    gradient = inputs.x.numpy().T @ inputs.g.numpy()
    deviation = gradient.std(1, keepdims=True, ddof=1)
    gradient -= gradient.mean(1, keepdims=True)
    gradient /= deviation
    return torch.from_numpy(np.abs(gradient, out=gradient).mean(0))
