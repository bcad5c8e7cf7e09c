"""What the GPU scan multiplies: queries split into bfloat16 parts, products, and the bound on their error.

A pass makes approximate scores of a chunk of keys by a library product. Its error is at most
‖k‖·margin(query) + slack(query), where the margin holds what rounding leaves of the query, the product's accumulation
in float32, and the rounding of keys; the slack holds what underflows, whatever the key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# per addition of a product: tensor cores cut off addends instead of rounding them, two units in the last place
_ACCUMULATION = 2.0**-22
_TINY = 2.0**-126  # below it numbers may be flushed to zero
_UPWARDS = 1 + 2.0**-20  # more than what the bounds' own arithmetic and their rounding to float32 lose
# torch may round the operands of a float32 product to TF32: twice 2⁻¹⁰
_FLOAT32_OPERANDS = 2.0**-8
# keys in two bfloat16 parts lose 2⁻¹⁸, and the product of both low parts, as much, is left out
_SPLIT_KEYS = 2.0**-16


@dataclass(frozen=True)
class PreparedQueries:
    """Queries as one pass reads them.

    Attributes:
        rows: [S, M] float32. scan_pass: one of `PASSES`.
        factor: [P·S, M] the left operand, P parts one below the other; None where nothing is multiplied.
        margins, slacks: [S] float32; the margin is NaN for a query that holds a NaN or infinity.
        dropped: [S] bool, those queries.
    """

    rows: Tensor
    scan_pass: str
    factor: Tensor | None
    margins: Tensor
    slacks: Tensor
    dropped: Tensor

    @property
    def n_parts(self) -> int:
        """P."""
        return 1 if self.factor is None else max(len(self.factor) // max(len(self.rows), 1), 1)


def pass_on_gpu(precision: str, key_dtype: torch.dtype) -> str:
    """The pass that serves `precision`: "auto" takes as few bfloat16 products as keys of this type need.

    "int8" runs when asked for by name: until benchmarks/gpu_check.py has measured it beside them on a device, "auto"
    has no reason to prefer it.
    """
    if precision != "auto":
        return precision
    return "bf16" if key_dtype == torch.bfloat16 else "bf16x2"


def prepare_queries(rows: Tensor, scan_pass: str, key_dtype: torch.dtype) -> PreparedQueries:
    """Split and bound the queries [S, M] float32 for a pass over keys of `key_dtype`; waits for nothing."""
    if scan_pass == "fp64":
        factor = None
        kept = rows.double()
    elif scan_pass == "fp32":
        factor = rows
        kept = rows.double()
    else:
        high = rows.bfloat16()
        parts = [high] if scan_pass == "bf16" else [high, (rows - high.float()).bfloat16()]
        factor = torch.cat(parts)
        kept = torch.stack([part.double() for part in parts]).sum(0)
    key_error = {"fp32": _FLOAT32_OPERANDS, "bf16x2": _SPLIT_KEYS * (key_dtype != torch.bfloat16)}.get(scan_pass, 0.0)
    dropped = ~torch.isfinite(rows).all(dim=1)
    margins, slacks = _error_bounds(rows.double(), kept, key_error)
    if factor is None:
        margins = torch.full_like(margins, math.inf)
    return PreparedQueries(rows, scan_pass, factor, margins.masked_fill(dropped, math.nan), slacks, dropped)


def _error_bounds(rows: Tensor, kept: Tensor, key_error: float) -> tuple[Tensor, Tensor]:
    """Margins and slacks [S] float32 of queries [S, M] float64 of which `kept` is multiplied."""
    width = rows.shape[1]
    accumulation = 1.02 * _ACCUMULATION * (width + 8)  # 1.02: parts are a little longer than what they are parts of
    lost = (rows - kept).norm(dim=1).nan_to_num(nan=math.inf)  # NaN: the high part overflowed
    margins = lost + (accumulation + key_error) * rows.norm(dim=1) + _TINY * math.sqrt(width)
    slacks = _TINY * (rows.abs().sum(dim=1) + 16 * width)
    return (margins * _UPWARDS).float(), (slacks * _UPWARDS).float()


def approximate_scores(queries: PreparedQueries, chunk: Tensor, buffer: Tensor) -> Tensor:
    """[S, n] float32 scores of the keys `chunk` [n, M], in `buffer` (P·S·n numbers at least)."""
    n, n_queries = len(chunk), len(queries.rows)
    if queries.factor is None:
        return buffer[:n].zero_().expand(n_queries, n)
    if queries.scan_pass == "fp32":
        return torch.mm(queries.factor, chunk.float().T, out=buffer[: n_queries * n].view(n_queries, n))
    high = chunk.bfloat16()
    products = _product(queries.factor, high, buffer)
    scores = products[:n_queries]
    for part in range(1, queries.n_parts):
        scores += products[part * n_queries : (part + 1) * n_queries]
    if chunk.dtype != torch.bfloat16:
        low = (chunk.float() - high.float()).bfloat16()
        scores += _product(queries.factor[:n_queries], low, buffer[queries.n_parts * n_queries * n :])
    return scores


def _product(factor: Tensor, keys: Tensor, buffer: Tensor) -> Tensor:
    """factor · keysᵀ in float32 from bfloat16, in the front of `buffer`."""
    out = buffer[: len(factor) * len(keys)].view(len(factor), len(keys))
    if factor.is_cuda:
        return torch.mm(factor, keys.T, torch.float32, out=out)
    return torch.mm(factor.float(), keys.float().T, out=out)  # torch multiplies so on GPUs alone


def choose_chunk_rows(n_queries: int, n_parts: int, width: int, *, copied_bytes: int, cache_bytes: int) -> int:
    """Keys per chunk: half of the last-level cache holds their approximate scores.

    Chunks whose keys are copied, `copied_bytes` for each entry, also stay below 64 MB of copies.
    """
    rows = cache_bytes // 2 // (4 * max(n_queries * n_parts, 1))
    if copied_bytes:
        rows = min(rows, (1 << 26) // (copied_bytes * width))
    return max(min(rows, 1 << 16) // 256 * 256, 256)
