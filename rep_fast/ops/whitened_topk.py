"""The collision scan: which corpus tokens have keys that a rank-one edit would hit.

A closed-form edit with key k* adds (kᵀC⁻¹k*)·r/(k*ᵀC⁻¹k*) to the value of every key k, so the tokens it disturbs most
are those of the largest whitened similarity kᵀC⁻¹k*. The scan finds the best k of a stream of keys for many queries at
once, exactly, in memory that does not grow with the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from rep_fast.errors import BackendError, HparamError, NonFiniteError
from rep_fast.ops import native
from rep_fast.ops.backend import Backend, choose, choose_or_warn
from rep_fast.ops.profile import recorded
from rep_fast.ops.scan_exclusion import LastTokenExclusion, PairExclusion, described
from rep_fast.ops.scan_int8 import LARGEST_INT8_WIDTH, prepare_dithered
from rep_fast.ops.scan_on_gpu import scan_on_gpu
from rep_fast.ops.scan_products import PreparedQueries, pass_on_gpu, prepare_queries
from rep_fast.ops.scan_queries import ScanQueries
from rep_fast.ops.topk_state import PASSES, REASONS, TopK, sums
from rep_fast.ops.unread_topk import UnreadTopK, no_counters, with_block
from rep_fast.reference import whitened_topk as reference

PRECISIONS = ("auto", *PASSES)
NONFINITE = ("raise", "exclude")
_KEY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DOT_BODY = "native-avx512_bf16"


def whitened_topk(
    keys: Tensor,
    queries: Tensor | ScanQueries,
    k: int,
    *,
    exclusion: LastTokenExclusion | PairExclusion | None = None,
    state: TopK | None = None,
    first_id: int = 0,
    precision: str = "auto",
    nonfinite: str = "raise",
    delta: float = 1e-9,
    seed: int = 0,
) -> TopK:
    """Best `k` keys for each whitened query, by inner product, added to a running state.

    score[i, j] = keys[j] · queries[i] with queries[i] = C⁻¹k*_i, the whitened similarity of a key and an edit.
    The result is the float64 answer on the numbers as stored: a fast pass only rules pairs out, by a proven bound on
    its own error, and what remains is scored in float64. It has the same bits for any number of threads, any cut of the
    stream into blocks and any instruction set; on a GPU the sums' last bits are its own.

    On a GPU nothing waits for the device: what must be refused is raised when the result is first read.

    Args:
        keys: [N, M] bfloat16, float16 or float32, a block of the stream; rows may be padded, columns contiguous.
        queries: [S, M] float32, already whitened; rows may be padded. `ScanQueries` where many blocks are scanned: they
            are packed once. On the keys' device, or on a GPU with keys on the host, which are then copied to it chunk
            by chunk while others are worked on.
        k: hits per query, k >= 1.
        exclusion: pairs that must not be hits; looked at only for pairs whose error bound lets them through.
        state: the result for the blocks before; not changed.
        first_id: id of row 0 of this block, >= 0; ids of blocks must not overlap.
        precision: the pass that rules pairs out; the hits are the same, at another cost. "fp64" scores every pair in
            float64, "fp32" multiplies in float32, "bf16" in bfloat16 with the queries rounded once, "bf16x2" with their
            high and low halves (bfloat16 keys and AVX-512 BF16), "int8" in integers, both sides rounded with a random
            dither (AVX-512 VNNI or a GPU). "auto" takes what costs least by this processor's measured rates and the
            pairs that each pass's error bound lets through on a sample; int8 gives way to the next one when more come
            through after all than its speed is worth. On a GPU "bf16x2" also takes other keys, in two halves, "auto" is
            "bf16", or "bf16x2" for those, and "int8" gives way to none. `TopK.reason` tells what ran and why.
        nonfinite: "raise", or "exclude" to leave out and count rows with a NaN or infinity.
        delta: probability, over the draw of the int8 pass's dither, that its bound fails for any pair of a scan of up
            to 2⁴⁰ keys; the other passes' bounds hold always.
        seed: of the dither, in [0, 2⁶³). Keys must not be built from it.
    Returns:
        TopK: scores descending, ties by the lower id; score −∞ and id −1 where there are fewer than k hits.
    Raises:
        HparamError: shapes, dtypes, layouts, devices or options do not fit.
        NonFiniteError: a NaN or infinity in keys or queries; the message names the first row.
        BackendError: `REP_FAST_ISA` names no instruction set, or the pass asked for has no body for these keys here.
    Cost: one pass over `keys`, 2·N·S·M floating-point operations; memory O(S·(k + M)).
    """
    _check_options(k, first_id, precision, nonfinite, delta, seed)
    rows = _rows_beside(keys, queries)
    _check_matrices(keys, rows)
    before = TopK.empty(rows.shape[0], k, device=rows.device) if state is None else state
    if exclusion is not None:
        exclusion.check_fits(keys.shape[0], rows.shape[0])
    if before.k != k:
        raise HparamError(f"whitened_topk: the state keeps k={before.k} hits, asked for k={k}")
    chosen = _with_room(choose("whitened_topk", rows.device), k)
    _check_pass(precision, keys, chosen)
    is_streamed = chosen.is_cuda and keys.device.type == "cpu" and rows.is_cuda
    if not is_streamed:
        _check_device(keys, "queries", rows)
    hits = before.unread if isinstance(before, UnreadTopK) else before
    options: dict[str, Any] = {"first_id": first_id, "precision": precision, "delta": delta, "seed": seed}
    options |= _NO_EXCLUSION | (exclusion.arguments() if exclusion is not None else {})
    work = {
        "flops": 2 * keys.shape[0] * rows.shape[0] * keys.shape[1],
        "bytes": keys.numel() * keys.element_size() + rows.numel() * 4 + 2 * hits.ids.numel() * 16,
    }
    with recorded("whitened_topk", chosen.name, device=rows.device, **work):
        found = _scanned(chosen, keys, queries, rows, hits, options)
    if chosen.is_cuda:
        scan_pass = pass_on_gpu(precision, keys.dtype)
        reason = REASONS[1 if precision == "auto" else 0]
        return _unread(before, found, len(keys), first_id, (scan_pass, reason), is_refused=nonfinite == "raise")
    scores, ids, dropped, counts = found
    n_nonfinite, first_nonfinite, _, *by_pass_and_reason = counts.tolist()
    passes, reasons = by_pass_and_reason[: len(PASSES)], by_pass_and_reason[len(PASSES) :]
    if nonfinite == "raise":
        _check_finite(n_nonfinite, first_id + first_nonfinite, first_nonfinite, dropped)
    return TopK(
        exact_scores=scores,
        ids=ids,
        n_keys_seen=before.n_keys_seen + keys.shape[0],
        n_nonfinite=before.n_nonfinite + n_nonfinite,
        dropped_queries=before.dropped_queries | dropped,
        pass_counts=sums(before.pass_counts, passes),
        reason_counts=sums(before.reason_counts, reasons),
    )


def _with_room(chosen: Backend, k: int) -> Backend:
    """The body itself, or the plain torch one where a state of k hits per query is too large for a GPU's block."""
    if chosen.is_cuda and chosen.module is not None and k > chosen.module.largest_k:
        return Backend("reference", f"the CUDA body keeps at most {chosen.module.largest_k} hits per query")
    return chosen


def _rows_beside(keys: Tensor, queries: Tensor | ScanQueries) -> Tensor:
    """[S, M] the queries: on the keys' device, unless they were made for a GPU and the keys are on the host."""
    if not isinstance(queries, ScanQueries):
        return queries
    is_streamed = keys.device.type == "cpu" and queries.home.type == "cuda"
    return queries.on(queries.home if is_streamed else keys.device)


def _scanned(
    chosen: Backend,
    keys: Tensor,
    queries: Tensor | ScanQueries,
    rows: Tensor,
    before: TopK,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the custom op returns; past it where an argument is no tensor on one device, which is all that one takes."""
    tensors = (keys, rows, before.exact_scores, before.ids)
    is_kept = isinstance(queries, ScanQueries) and chosen.module is not None
    if chosen.module is None or not (is_kept or keys.device != rows.device):
        found: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.rep_fast.whitened_topk(*tensors, **options)
        return found
    kept = queries if isinstance(queries, ScanQueries) else None
    if chosen.is_cuda:
        return _gpu_scan(chosen.module, *tensors, **options, kept=kept, n_seen=before.n_keys_seen)
    packings = None if kept is None else kept.packings(chosen.module)
    return _native_scan(chosen.module, chosen.level, *tensors, **options, packings=packings)


def _unread(
    before: TopK,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    n_keys: int,
    first_id: int,
    choice: tuple[str, str],
    *,
    is_refused: bool,
) -> UnreadTopK:
    """The state after a block on a GPU, which has perhaps not been worked on yet; `choice`: its pass and the reason."""
    scores, ids, dropped, counts = found
    if isinstance(before, UnreadTopK):
        hits, counters = before.unread, before.counters
    else:
        hits, counters = before, no_counters(scores.device)
    seen = TopK(
        exact_scores=scores,
        ids=ids,
        n_keys_seen=hits.n_keys_seen + n_keys,
        n_nonfinite=hits.n_nonfinite,
        dropped_queries=hits.dropped_queries | dropped,
        pass_counts=sums(hits.pass_counts, [n_keys * (name == choice[0]) for name in PASSES]),
        reason_counts=sums(hits.reason_counts, [n_keys * (reason == choice[1]) for reason in REASONS]),
    )
    return UnreadTopK(seen, with_block(counters, counts[0], counts[1], first_id), _check_finite if is_refused else None)


_NO_EXCLUSION = dict.fromkeys(
    ("token_ids", "sequence_starts", "last_tokens", "lookback", "indptr", "subjects"), None
) | {"window": 0}


@library.custom_op("rep_fast::whitened_topk", mutates_args=())
def _whitened_topk(
    keys: Tensor,
    queries: Tensor,
    scores: Tensor,
    ids: Tensor,
    first_id: int,
    token_ids: Tensor | None,
    sequence_starts: Tensor | None,
    last_tokens: Tensor | None,
    lookback: Tensor | None,
    window: int,
    indptr: Tensor | None,
    subjects: Tensor | None,
    precision: str,
    delta: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Functional door over plain tensors: (scores, ids, dropped queries, counts of `_outputs`)."""
    rules: dict[str, Any] = {
        "token_ids": token_ids,
        "sequence_starts": sequence_starts,
        "last_tokens": last_tokens,
        "lookback": lookback,
        "window": window,
        "indptr": indptr,
        "subjects": subjects,
    }
    chosen = _with_room(choose_or_warn("whitened_topk", keys.device), ids.shape[1])
    options = {"first_id": first_id, "precision": precision, "delta": delta, "seed": seed, **rules}
    if chosen.module is not None and chosen.is_cuda:
        return _gpu_scan(chosen.module, keys, queries, scores, ids, **options, kept=None, n_seen=0)
    if chosen.module is not None:
        return _native_scan(chosen.module, chosen.level, keys, queries, scores, ids, **options, packings=None)
    _outputs(keys, queries, scores, ids, **options)
    return reference.whitened_topk(keys, queries, scores, ids, first_id=first_id, **rules)


def _gpu_scan(
    module: ModuleType,
    keys: Tensor,
    queries: Tensor,
    scores: Tensor,
    ids: Tensor,
    *,
    kept: ScanQueries | None,
    precision: str,
    delta: float,
    seed: int,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_beside(queries, scores, ids, options["token_ids"], options["indptr"])
    scan_pass = pass_on_gpu(precision, keys.dtype)
    keys, rows = keys.detach(), queries.detach()
    prepare: Callable[[], PreparedQueries] = partial(prepare_queries, rows, scan_pass, keys.dtype)
    how: tuple[Hashable, ...] = (queries.device, scan_pass, keys.dtype)
    if scan_pass == "int8":
        prepare = partial(prepare_dithered, module, rows, keys, delta=delta, seed=seed)
        how = (queries.device, scan_pass, delta, seed)
    prepared = prepare() if kept is None else kept.prepared(how, prepare)
    return scan_on_gpu(module, keys, prepared, scores, ids, **options)


def _native_scan(
    module: ModuleType,
    level: int,
    keys: Tensor,
    queries: Tensor,
    scores: Tensor,
    ids: Tensor,
    *,
    packings: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new_scores, new_ids, dropped, counts = _outputs(keys, queries, scores, ids, **options)
    *found, pass_keys, reason_keys = module.whitened_topk(
        keys=keys,
        queries=queries,
        scores=new_scores.copy_(scores),
        ids=new_ids.copy_(ids),
        query_dropped=dropped,
        **{name: value.contiguous() if isinstance(value, Tensor) else value for name, value in options.items()},
        packings=packings,
        level=level,
        n_threads=native.n_threads(),
    )
    return new_scores, new_ids, dropped, counts.copy_(torch.tensor([*found, *pass_keys, *reason_keys]))


@_whitened_topk.register_fake
def _outputs(
    keys: Tensor,
    queries: Tensor,
    scores: Tensor,
    ids: Tensor,
    first_id: int,
    token_ids: Tensor | None,
    sequence_starts: Tensor | None,
    last_tokens: Tensor | None,
    lookback: Tensor | None,
    window: int,
    indptr: Tensor | None,
    subjects: Tensor | None,
    precision: str,
    delta: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks and allocation, shared by the fake and the kernels.

    Returns scores [S, k] float64, ids [S, k] int64, dropped queries [S] bool, and counts
    [3 + len(PASSES) + len(REASONS)] int64: keys dropped, the first of them (row number or −1), pairs scored in float64,
    keys that each pass went over, the same by why.
    """
    _check_matrices(keys, queries)
    _check_device(keys, "queries", queries)
    _check_beside(queries, scores, ids, token_ids, indptr)
    return (
        torch.empty(scores.shape, dtype=torch.float64, device=keys.device),
        torch.empty(ids.shape, dtype=torch.int64, device=keys.device),
        torch.empty(queries.shape[:1], dtype=torch.bool, device=keys.device),
        torch.empty(3 + len(PASSES) + len(REASONS), dtype=torch.int64, device=keys.device),
    )


def _check_matrices(keys: Tensor, queries: Tensor) -> None:
    if keys.dim() != 2 or keys.dtype not in _KEY_DTYPES or keys.shape[1] < 1:
        raise HparamError(
            f"whitened_topk: keys must be (tokens, width) bfloat16|float16|float32, got {described(keys)}"
        )
    if queries.dim() != 2 or queries.dtype != torch.float32:
        raise HparamError(f"whitened_topk: queries must be (queries, width) float32, got {described(queries)}")
    if keys.shape[1] != queries.shape[1]:
        raise HparamError(f"whitened_topk: keys are {keys.shape[1]} wide, queries {queries.shape[1]}")
    for name, matrix in (("keys", keys), ("queries", queries)):
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise HparamError(
                f"whitened_topk: columns of {name} must be contiguous, got stride {matrix.stride(1)}; "
                f"call .contiguous()"
            )


def _check_beside(
    queries: Tensor, scores: Tensor, ids: Tensor, token_ids: Tensor | None, indptr: Tensor | None
) -> None:
    if scores.dim() != 2 or scores.shape != ids.shape or scores.shape[0] != queries.shape[0]:
        raise HparamError(
            f"whitened_topk: the state is {tuple(scores.shape)}, but there are {queries.shape[0]} queries"
        )
    for name, tensor in (("the state", scores), ("token_ids", token_ids), ("indptr", indptr)):
        _check_device(queries, name, tensor)


def _check_device(keys: Tensor, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.device != keys.device:
        raise HparamError(f"whitened_topk: keys are on {keys.device}, {name} on {tensor.device}")


def _check_options(k: int, first_id: int, precision: str, nonfinite: str, delta: float, seed: int) -> None:
    if k < 1:
        raise HparamError(f"whitened_topk: k must be at least 1, got {k}")
    if first_id < 0:
        raise HparamError(f"whitened_topk: first_id must be at least 0, got {first_id}")
    if precision not in PRECISIONS:
        raise HparamError(f"whitened_topk: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if nonfinite not in NONFINITE:
        raise HparamError(f"whitened_topk: nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
    if not 0 < delta < 1:
        raise HparamError(f"whitened_topk: delta must lie between 0 and 1, got {delta}")
    if not 0 <= seed < 2**63:
        raise HparamError(f"whitened_topk: seed must lie in [0, 2**63), got {seed}")


def _check_pass(precision: str, keys: Tensor, chosen: Backend) -> None:
    needs = ""
    has_dot_products = chosen.name == _DOT_BODY or chosen.is_cuda
    if precision == "bf16x2" and chosen.is_cuda:
        return
    if precision.startswith("bf16") and (keys.dtype != torch.bfloat16 or not has_dot_products):
        needs = "bfloat16 keys and a processor with AVX-512 BF16"
    if precision == "int8" and (keys.shape[1] > LARGEST_INT8_WIDTH or not has_dot_products):
        needs = f"keys at most {LARGEST_INT8_WIDTH} wide and a processor with AVX-512 BF16 and VNNI, or a GPU"
    if needs:
        raise BackendError(
            f"whitened_topk: precision {precision!r} needs {needs}, here are "
            f"{str(keys.dtype).removeprefix('torch.')} keys and body {chosen.name}; use precision='auto'"
        )


def _check_finite(n_nonfinite: int, first_bad_id: int, row: int, dropped: Tensor) -> None:
    remedy = "fix the input or pass nonfinite='exclude'"
    if n_nonfinite:
        raise NonFiniteError(f"whitened_topk: keys hold a NaN or infinity in row {row} (id {first_bad_id}); {remedy}")
    if bool(dropped.any()):
        row = int(dropped.nonzero()[0])
        raise NonFiniteError(f"whitened_topk: queries hold a NaN or infinity in row {row}; {remedy}")
