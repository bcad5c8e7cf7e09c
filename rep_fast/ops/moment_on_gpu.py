"""Second moments of 16-bit keys on a GPU: tokens that do not count are told apart there and skipped, not cut out."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rep_fast.ops.native import stream_number


class UnreadTokens(NamedTuple):
    """Rows of a block, which of them count, [T] bool, and numbers that wait on the device.

    numbers: [3] int64, how many count, how many of the mask hold a NaN or infinity, and the first of those.
    """

    rows: Tensor
    counts: Tensor
    numbers: Tensor


def count_tokens(module: ModuleType, keys: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`counts` and `numbers` of `UnreadTokens`, from one look of the device at keys [T, M].

    Args:
        module: `rep_fast._C_cuda`.
        mask: [T] bool, or None for all.
    """
    counts = torch.empty(len(keys), dtype=torch.bool, device=keys.device)
    numbers = torch.zeros(3, dtype=torch.int64, device=keys.device)
    numbers[2] = torch.iinfo(torch.int64).max
    module.count_tokens(
        keys=keys,
        mask=None if mask is None else mask.to(keys.device).contiguous(),
        counts=counts,
        counters=numbers,
        stream=stream_number(keys.device),
    )
    return counts, numbers


def accumulate_on_gpu(module: ModuleType, lower: Tensor, keys: Tensor, counts: Tensor | None) -> None:
    """lower += tril(Σ k kᵀ) over the tokens that count."""
    module.accumulate_moment(keys=keys, counts=counts, total=lower, stream=stream_number(keys.device))
