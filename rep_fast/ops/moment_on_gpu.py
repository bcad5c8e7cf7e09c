"""Second moments of 16-bit keys on a GPU: tokens that do not count are told apart there and skipped, not cut out.

The first body, "mma", serves until the others have been measured beside it. `REP_FAST_GPU_MOMENT=wgmma128` or
`wgmma192` asks for the one that Hopper has, with tiles of so many columns; what it does not take is still served by the
first.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rep_fast.ops.gpu_bodies import asked_gpu_body
from rep_fast.ops.native import stream_number

_TILE_COLUMNS = {"wgmma128": 128, "wgmma192": 192}


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
    """lower += tril(Σ k kᵀ) over the tokens that count.

    Raises:
        BackendError: `REP_FAST_GPU_MOMENT` names no body, or one that this GPU does not have.
    """
    body = asked_gpu_body("accumulate_moment", keys.device)
    given: dict[str, Any] = {"keys": keys, "counts": counts, "total": lower, "stream": stream_number(keys.device)}
    if body in _TILE_COLUMNS and module.can_accumulate_by_wgmma(keys=keys):
        module.accumulate_moment_by_wgmma(tile_columns=_TILE_COLUMNS[body], **given)
    else:
        module.accumulate_moment(**given)
