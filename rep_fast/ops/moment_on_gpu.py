"""Second moments of 16-bit keys on a GPU: tokens that do not count are told apart there and skipped, not cut out."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rep_fast.ops.native import stream_number


class CountedTokens(NamedTuple):
    """Which tokens count, [T] bool on the device, how many do, how many of the mask hold a NaN or infinity and the
    first of those."""

    counts: Tensor
    n_counted: int
    n_nonfinite: int
    first_nonfinite: int


def count_tokens(module: ModuleType, keys: Tensor, mask: Tensor | None) -> CountedTokens:
    """Looks at keys [T, M] once, and waits for the numbers.

    Args:
        module: `rep_fast._C_cuda`.
        mask: [T] bool, or None for all.
    """
    counts = torch.empty(len(keys), dtype=torch.bool, device=keys.device)
    counters = torch.zeros(3, dtype=torch.int64, device=keys.device)
    counters[2] = torch.iinfo(torch.int64).max
    module.count_tokens(
        keys=keys,
        mask=None if mask is None else mask.to(keys.device).contiguous(),
        counts=counts,
        counters=counters,
        stream=stream_number(keys.device),
    )
    return CountedTokens(counts, *counters.tolist())


def accumulate_on_gpu(module: ModuleType, lower: Tensor, keys: Tensor, counts: Tensor | None) -> None:
    """lower += tril(Σ k kᵀ) over the tokens that count."""
    module.accumulate_moment(keys=keys, counts=counts, total=lower, stream=stream_number(keys.device))
