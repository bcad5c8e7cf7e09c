"""The scan's second body on a GPU: the selection inside the product (sm_90), where no scores are written down.

It multiplies bfloat16 keys as they are, or keys of any type in whole steps of int8. The first body, a library product
and a kernel that selects, serves until this one has been measured beside it: `REP_FAST_GPU_SCAN=fused` asks for it, and
keys it does not take are still served by the first.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rep_fast.ops.gpu_bodies import asked_gpu_body
from rep_fast.ops.scan_int8 import DitheredQueries, QuantisedKeys
from rep_fast.ops.scan_products import PreparedQueries

# Few keys leave low limits, and long lists: the first keys of a stream go through the other body.
_OPENING_ROWS = 4096
_CHUNK_ROWS = 1 << 16
_STAGED_BYTES = 1 << 28  # of a chunk that comes from the host
_LIST_BYTES = 32 << 20
# n keys bring some k·n/n_seen better ones, and their margins some more: 3.2 times as many in all at M = 11008
_CANDIDATES_PER_BETTER_KEY = 8


def is_fused_asked_for(device: torch.device) -> bool:
    """Whether `REP_FAST_GPU_SCAN` asks for the fused body on `device`.

    Raises:
        BackendError: it names no body, or the fused one for a GPU that has none.
    """
    return asked_gpu_body("whitened_topk", device) == "fused"


class FusedChunks:
    """The fused scan of many chunks: its operands and the memory between its kernels.

    Args:
        module: `rep_fast._C_cuda`.
        queries: of a bfloat16 pass or of the int8 one.
        counters: [2] int64, rows that are not finite and the first of them.
        rows: keys of a chunk at most.
    """

    def __init__(self, module: ModuleType, queries: PreparedQueries, counters: Tensor, rows: int) -> None:
        n_queries, device = len(queries.rows), queries.rows.device
        capacity = _list_capacity(n_queries, rows)
        self._scan = module.scan_fused
        self._operands: dict[str, Any] = {
            "factor": queries.factor,
            "n_parts": queries.n_parts,
            "counters": counters,
            "limits": torch.empty(module.padded_queries(n_queries), 4, device=device),
            "counts": torch.empty(n_queries, dtype=torch.int32, device=device),
            "candidates": torch.empty(n_queries, capacity, dtype=torch.int32, device=device),
        }
        self._quantised: QuantisedKeys | None = None
        if isinstance(queries, DitheredQueries):
            self._quantised = QuantisedKeys(module, queries, rows, counters)
            self._operands |= {"query_steps": queries.steps}

    def scan(self, chunk: Tensor, first_row: int, **given: Any) -> None:
        """Let keys [n, M] that belong there into the running hits; `given`: queries and rules, as for `select_hits`."""
        if self._quantised is not None:
            values, steps, margins = self._quantised.take(chunk, first_row)
            given |= {"key_values": values, "key_steps": steps, "key_margins": margins}
        self._scan(keys=chunk, first_row=first_row, **self._operands, **given)


def fused_begin(module: ModuleType, keys: Tensor, queries: PreparedQueries, *, k: int, n_seen: int) -> int:
    """Row of `keys` from which on the fused body serves; the number of rows where it does not.

    Args:
        k: hits per query. n_seen: keys of the stream before these.
    Raises:
        BackendError: see `is_fused_asked_for`.
    """
    is_served = is_fused_asked_for(queries.rows.device) and queries.factor is not None
    if not is_served or not _takes(module, keys, queries):
        return len(keys)
    return min(max(_opening_rows(len(queries.rows), fused_rows(module, keys, queries), k) - n_seen, 0), len(keys))


def _opening_rows(n_queries: int, rows: int, k: int) -> int:
    """Keys of a stream after which the lists have room for the candidates of a chunk of `rows`."""
    capacity = _list_capacity(n_queries, rows)
    if capacity >= rows:
        return _OPENING_ROWS
    return max(_OPENING_ROWS, _CANDIDATES_PER_BETTER_KEY * k * rows // capacity)


def _list_capacity(n_queries: int, rows: int) -> int:
    return max(min(_LIST_BYTES // (4 * max(n_queries, 1)), rows), 1)


def _takes(module: ModuleType, keys: Tensor, queries: PreparedQueries) -> bool:
    if isinstance(queries, DitheredQueries):
        return True  # whatever the keys are, they are multiplied as they were quantised
    assert queries.factor is not None
    if not queries.factor.dtype == keys.dtype == torch.bfloat16:
        return False
    # what is on the host comes to the device contiguous
    there = keys if keys.device == queries.rows.device else queries.factor
    can_fuse: bool = module.can_fuse(keys=there, factor=queries.factor, n_parts=queries.n_parts)
    return can_fuse


def fused_rows(module: ModuleType, keys: Tensor, queries: PreparedQueries) -> int:
    """Keys per chunk: many tiles for every multiprocessor, unless they are copied from the host first.

    Of keys in whole steps each multiprocessor gets one tile: what is quantised takes memory, and the less of it the
    more of it the cache still holds when it is multiplied.
    """
    device, rows = queries.rows.device, _CHUNK_ROWS
    if isinstance(queries, DitheredQueries):
        tile = (module.fused_tile_keys, module.fused_tile_queries(len(queries.rows)))
        rows = min(rows, rows_of_a_wave(len(queries.rows), tile, _n_multiprocessors(device)))
    if keys.device != device:
        rows = min(rows, _STAGED_BYTES // (keys.element_size() * max(keys.shape[1], 1)))
    return max(rows, 1)


def rows_of_a_wave(n_queries: int, tile: tuple[int, int], n_multiprocessors: int) -> int:
    """Keys that make as many tiles as run at once, or the fewest more.

    Args:
        tile: its keys and queries.
    """
    query_tiles = max(-(-n_queries // tile[1]), 1)
    return max(n_multiprocessors // query_tiles, 1) * tile[0]


def _n_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
