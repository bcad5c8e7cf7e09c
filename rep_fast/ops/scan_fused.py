"""The scan's second body on a GPU: the selection inside the product (sm_90), where no scores are written down.

The first body, a library product and a kernel that selects, serves until this one has been measured beside it.
`REP_FAST_GPU_SCAN=fused` asks for it; keys it does not take are still served by the first.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rep_fast.errors import BackendError
from rep_fast.ops.scan_products import PreparedQueries

BODIES = ("product", "fused")
# Few keys leave low limits, and long lists: the first keys of a block go through the other body.
_OPENING_ROWS = 4096
_CHUNK_ROWS = 1 << 16
_STAGED_BYTES = 1 << 28  # of a chunk that comes from the host
_LIST_BYTES = 32 << 20
_HOPPER = (9, 0)


def is_fused_asked_for(device: torch.device) -> bool:
    """Whether `REP_FAST_GPU_SCAN` asks for the fused body on `device`.

    Raises:
        BackendError: it names no body, or the fused one for a GPU that has none.
    """
    name = os.environ.get("REP_FAST_GPU_SCAN", BODIES[0])
    if name not in BODIES:
        raise BackendError(f"REP_FAST_GPU_SCAN: must be one of {', '.join(BODIES)}, got {name!r}")
    if name != "fused":
        return False
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else _HOPPER
    if (major, minor) != _HOPPER:
        raise BackendError(f"REP_FAST_GPU_SCAN: 'fused' needs a GPU of sm_90, this is sm_{major}{minor}; unset it")
    return True


class FusedChunks:
    """The fused scan of many chunks: its operands and the memory between its kernels.

    Args:
        module: `rep_fast._C_cuda`.
        queries: of a bfloat16 pass.
        counters: [2] int64, rows that are not finite and the first of them.
        rows: keys of a chunk at most.
    """

    def __init__(self, module: ModuleType, queries: PreparedQueries, counters: Tensor, rows: int) -> None:
        n_queries, device = len(queries.rows), queries.rows.device
        capacity = max(min(_LIST_BYTES // (4 * max(n_queries, 1)), rows), 1)
        self._scan = module.scan_fused
        self._operands: dict[str, Any] = {
            "factor": queries.factor,
            "n_parts": queries.n_parts,
            "counters": counters,
            "limits": torch.empty(module.padded_queries(n_queries), 4, device=device),
            "counts": torch.empty(n_queries, dtype=torch.int32, device=device),
            "candidates": torch.empty(n_queries, capacity, dtype=torch.int32, device=device),
        }

    def scan(self, chunk: Tensor, first_row: int, **given: Any) -> None:
        """Let keys [n, M] that belong there into the running hits; `given`: queries and rules, as for `select_hits`."""
        self._scan(keys=chunk, first_row=first_row, **self._operands, **given)


def fused_begin(module: ModuleType, keys: Tensor, queries: PreparedQueries) -> int:
    """Row of `keys` from which on the fused body serves; the number of rows where it does not.

    Raises:
        BackendError: see `is_fused_asked_for`.
    """
    is_served = (
        is_fused_asked_for(queries.rows.device)
        and queries.factor is not None
        and queries.factor.dtype == keys.dtype == torch.bfloat16
        and 0 < _OPENING_ROWS < len(keys)
    )
    if not is_served:
        return len(keys)
    # what is on the host comes to the device contiguous
    there = keys if keys.device == queries.rows.device else queries.factor
    can_fuse = module.can_fuse(keys=there, factor=queries.factor, n_parts=queries.n_parts)
    return _OPENING_ROWS if can_fuse else len(keys)


def fused_rows(keys: Tensor, device: torch.device) -> int:
    """Keys per chunk: enough tiles for every multiprocessor, unless they are copied from the host first."""
    if keys.device == device:
        return _CHUNK_ROWS
    return max(min(_CHUNK_ROWS, _STAGED_BYTES // (2 * keys.shape[1])), 1)
