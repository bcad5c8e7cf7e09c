"""The collision scan on a GPU: chunk by chunk a library product, whose scores stay in the L2 cache, and a kernel that
makes exact hits of them; or, when asked for, the fused body of `rep_fast.ops.scan_fused`. Nothing here waits for the
device."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rep_fast.ops.native import stream_number
from rep_fast.ops.scan_fused import FusedChunks, fused_begin, fused_rows
from rep_fast.ops.scan_int8 import DitheredQueries, Int8Chunks
from rep_fast.ops.scan_products import PreparedQueries, approximate_scores, choose_chunk_rows
from rep_fast.ops.topk_state import PASSES, REASONS

_CACHE_BYTES = 32 << 20  # where the device does not tell


def scan_on_gpu(
    module: ModuleType,
    keys: Tensor,
    queries: PreparedQueries,
    scores: Tensor,
    ids: Tensor,
    *,
    first_id: int,
    window: int,
    n_seen: int = 0,
    **rules: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State after `keys` and counts, as the custom op in `rep_fast.ops.whitened_topk` returns them.

    Args:
        module: `rep_fast._C_cuda`.
        keys: [N, M] on the queries' device, or on the host: then they are copied ahead of the work.
        scores, ids: [S, k] the state before, not changed.
        n_seen: keys of the stream before these, as far as known.
        rules: the tensors of the exclusion rules.
    """
    device = queries.rows.device
    scores, ids = scores.clone(), ids.clone()
    counters = torch.full((2,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
    counters[0] = 0
    rows = min(_chunk_rows(queries, keys), max(len(keys), 1))
    given: dict[str, Any] = {
        "first_id": first_id,
        "queries": queries.rows,
        "margins": queries.margins,
        "slacks": queries.slacks,
        "window": window,
        "scores": scores,
        "ids": ids,
        "stream": stream_number(device),
        **{name: None if t is None else t.contiguous() for name, t in rules.items()},
    }
    begin = fused_begin(module, keys, queries, k=ids.shape[1], n_seen=n_seen)
    if begin > 0:
        chunks = _scored_chunks(module, queries, keys, rows, counters)
        for first, chunk in chunks_on(device, keys[:begin], rows):
            module.select_hits(keys=chunk, first_row=first, **chunks.scored(chunk, first), **given)
        del chunks  # its memory is the next one's
    if begin < len(keys):
        fused_chunk = min(fused_rows(module, keys, queries), len(keys) - begin)
        fused = FusedChunks(module, queries, counters, fused_chunk)
        for first, chunk in chunks_on(device, keys[begin:], fused_chunk):
            fused.scan(chunk, begin + first, **given)
    return scores, ids, queries.dropped, _counts(counters, queries.scan_pass, len(keys))


def _scored_chunks(
    module: ModuleType, queries: PreparedQueries, keys: Tensor, rows: int, counters: Tensor
) -> Int8Chunks | _FloatChunks:
    if isinstance(queries, DitheredQueries):
        return Int8Chunks(module, queries, rows, counters)
    return _FloatChunks(module, queries, keys, rows, counters)


class _FloatChunks:
    """Scores of chunks of at most `rows` keys by a floating-point product."""

    def __init__(self, module: ModuleType, queries: PreparedQueries, keys: Tensor, rows: int, counters: Tensor) -> None:
        device = queries.rows.device
        n_products = queries.n_parts + _is_split(queries, keys)
        self._module, self._queries, self._counters = module, queries, counters
        self._buffer = torch.empty(n_products * max(len(queries.rows), 1) * rows, device=device)
        self._norms = torch.empty(rows, device=device)

    def scored(self, chunk: Tensor, first_row: int) -> dict[str, Tensor]:
        """What `select_hits` reads of the keys `chunk` [n, M]; counts the rows that are not finite."""
        norms = self._norms[: len(chunk)]
        stream = stream_number(norms.device)
        self._module.measure_keys(keys=chunk, first_id=first_row, norms=norms, counters=self._counters, stream=stream)
        return {"norms": norms, "approximate": approximate_scores(self._queries, chunk, self._buffer)}


def _counts(counters: Tensor, scan_pass: str, n_keys: int) -> Tensor:
    # why is known where the pass was chosen
    counts = torch.zeros(3 + len(PASSES) + len(REASONS), dtype=torch.int64, device=counters.device)
    counts[0] = counters[0]
    counts[1] = torch.where(counters[0] > 0, counters[1], -1)
    counts[2] = -1  # pairs scored exactly are not counted here
    counts[3 + PASSES.index(scan_pass)] = n_keys
    return counts


def _is_split(queries: PreparedQueries, keys: Tensor) -> bool:
    return queries.scan_pass == "bf16x2" and keys.dtype != torch.bfloat16


def _chunk_rows(queries: PreparedQueries, keys: Tensor) -> int:
    device = queries.rows.device
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CACHE_BYTES
    is_widened = queries.scan_pass == "fp32" and keys.dtype != torch.float32
    copied_bytes = 1 if queries.scan_pass == "int8" else 4 * (_is_split(queries, keys) or is_widened)
    return choose_chunk_rows(
        len(queries.rows), queries.n_parts, max(keys.shape[1], 1), copied_bytes=copied_bytes, cache_bytes=cache
    )


def chunks_on(device: torch.device, keys: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, chunk of at most `rows` keys on `device`), in order.

    Keys on the host go through two page-locked buffers and a stream of their own, one chunk ahead of the work on the
    current stream.
    """
    starts = range(0, len(keys), rows)
    if keys.device == device:
        for start in starts:
            yield start, keys[start : start + rows]
        return
    copier = _Copier(device, keys, rows)
    if starts:
        copier.send(0, 0)
    for number, start in enumerate(starts):
        if number + 1 < len(starts):
            copier.send(number + 1, starts[number + 1])
        yield start, copier.arrived(number, start)
        copier.release(number)


class _Copier:
    """Two buffers on the host and two on the device; chunk n goes through those of n mod 2."""

    def __init__(self, device: torch.device, keys: Tensor, rows: int) -> None:
        self._keys, self._rows = keys, rows
        shape = (min(rows, len(keys)), keys.shape[1])
        self._staging = [torch.empty(shape, dtype=keys.dtype, pin_memory=True) for _ in range(2)]
        self._landed = [torch.empty(shape, dtype=keys.dtype, device=device) for _ in range(2)]
        self._work = torch.cuda.current_stream(device)
        self._copies = torch.cuda.Stream(device)
        self._copies.wait_stream(self._work)  # what used the device buffers' memory before
        for landed in self._landed:  # nor does anybody get it who works on before a copy has ended
            landed.record_stream(self._copies)
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._released: list[torch.cuda.Event | None] = [None, None]

    def send(self, number: int, start: int) -> None:
        """Start copying the keys from row `start` on."""
        slot = number % 2
        sent, released = self._sent[slot], self._released[slot]
        if sent is not None:
            sent.synchronize()  # the host's buffer is free when its last copy is done
        part = self._keys[start : start + self._rows]
        self._staging[slot][: len(part)].copy_(part)
        if released is not None:
            self._copies.wait_event(released)
        with torch.cuda.stream(self._copies):
            self._landed[slot][: len(part)].copy_(self._staging[slot][: len(part)], non_blocking=True)
            self._sent[slot] = self._copies.record_event()

    def arrived(self, number: int, start: int) -> Tensor:
        """The chunk on the device; the current stream waits for it."""
        sent = self._sent[number % 2]
        assert sent is not None
        self._work.wait_event(sent)
        return self._landed[number % 2][: min(self._rows, len(self._keys) - start)]

    def release(self, number: int) -> None:
        """The work handed to the current stream so far is the last that reads this chunk."""
        self._released[number % 2] = self._work.record_event()
