"""Rows on which a pass with a bound on its error might lose a hit."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(n: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, width, generator=generator)


def outlier_columns(n: int, width: int, generator: torch.Generator) -> Tensor:
    values = normal(n, width, generator)
    values[:, 3::37] *= 1000
    return values


def ill_conditioned(n: int, width: int, generator: torch.Generator) -> Tensor:
    """Condition 1e8 of the second moment, in a basis that no balancing of columns sees."""
    basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1))).Q
    return (normal(n, width, generator) * torch.logspace(0, -4, width)) @ basis


def constant_rows(n: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 1, generator=generator).expand(n, width).contiguous()


def subnormal(n: int, width: int, generator: torch.Generator) -> Tensor:
    return normal(n, width, generator) * 1e-39


def few_values(n: int, width: int, generator: torch.Generator) -> Tensor:
    """Many ties and zero rows, and entries half-way between two steps."""
    values = torch.randint(-1, 2, (n, width), generator=generator) * 0.5
    values[:, 0] = 127
    values[::9] = 0
    return values


KINDS = (normal, outlier_columns, ill_conditioned, constant_rows, subnormal, few_values)
