"""The collision scan in plain torch float64: every score of a block, the exclusion as a mask, a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor

# rows scored at once: bounds the [rows, m] scores and mask
_BLOCK_ROWS = 1024


def whitened_topk(
    keys: Tensor,
    queries: Tensor,
    scores: Tensor,
    ids: Tensor,
    *,
    first_id: int,
    token_ids: Tensor | None,
    sequence_starts: Tensor | None,
    last_tokens: Tensor | None,
    lookback: Tensor | None,
    window: int,
    indptr: Tensor | None,
    subjects: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Running state after `keys`; arguments and results as the custom op in `rep_fast.ops.whitened_topk`."""
    query_dropped = ~torch.isfinite(queries).all(dim=1)  # [m]
    finite_queries = torch.where(query_dropped.unsqueeze(1), 0.0, queries).double()  # [m, M]
    scores, ids = scores.clone(), ids.clone()
    nonfinite_rows = []
    for start in range(0, keys.shape[0], _BLOCK_ROWS):
        rows = torch.arange(start, min(start + _BLOCK_ROWS, keys.shape[0]), device=keys.device)  # [n]
        block = keys[start : start + _BLOCK_ROWS].double()  # [n, M]
        is_bad = ~torch.isfinite(block).all(dim=1)  # [n]
        nonfinite_rows.append(rows[is_bad])
        out = is_bad.unsqueeze(1) | query_dropped.unsqueeze(0)  # [n, m]
        if token_ids is not None and sequence_starts is not None and last_tokens is not None:
            out = out | last_token_mask(rows, token_ids, sequence_starts, last_tokens, lookback, window)
        if indptr is not None and subjects is not None:
            out = out | pair_mask(rows, indptr, subjects, queries.shape[0])
        products = torch.where(is_bad.unsqueeze(1), 0.0, block) @ finite_queries.T  # [n, m]
        block_scores = products.masked_fill(out, -torch.inf).T  # [m, n]
        block_ids = torch.where(out.T, -1, first_id + rows)  # [m, n]
        scores, ids = select_best(torch.cat([scores, block_scores], 1), torch.cat([ids, block_ids], 1), ids.shape[1])
    bad = torch.cat([*nonfinite_rows, torch.empty(0, dtype=torch.int64, device=keys.device)])
    first_bad = bad[:1] if bad.numel() else bad.new_full((1,), -1)
    n_rescored = bad.new_full((1,), keys.shape[0] * queries.shape[0])
    pass_keys = bad.new_tensor([keys.shape[0], 0, 0, 0, 0])  # every pair in float64, the first of the passes
    reason_keys = bad.new_tensor([0, keys.shape[0], 0, 0, 0])  # there is no other here
    counts = torch.cat([bad.new_full((1,), bad.numel()), first_bad, n_rescored, pass_keys, reason_keys])
    return scores, ids, query_dropped, counts


def select_best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns per row, by score descending, then id ascending; id −1 (score −∞) comes last.

    Args:
        scores: [m, c] float64. ids: [m, c] int64. c >= k.
    """
    by_id = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(dim=1, stable=True)
    ordered = scores.gather(1, by_id)
    best = ordered.argsort(dim=1, descending=True, stable=True)[:, :k]
    return ordered.gather(1, best), ids.gather(1, by_id).gather(1, best)


def last_token_mask(
    rows: Tensor,
    token_ids: Tensor,
    sequence_starts: Tensor,
    last_tokens: Tensor,
    lookback: Tensor | None,
    window: int,
) -> Tensor:
    """[n, m] true where last_tokens[i] occurs at p, p−1, …, p−window inside the sequence of p = rows[j]."""
    n_before = 0 if lookback is None else lookback.numel()
    stream = token_ids if lookback is None else torch.cat([lookback, token_ids])
    start = sequence_starts[torch.searchsorted(sequence_starts, rows, right=True) - 1]  # [n]
    start = torch.where(start == 0, -n_before, start)
    mask = torch.zeros(rows.numel(), last_tokens.numel(), dtype=torch.bool, device=rows.device)
    for back in range(window + 1):
        position = rows - back
        inside = position >= start
        token = stream[(position + n_before).clamp(min=0)]
        mask |= inside.unsqueeze(1) & (token.unsqueeze(1) == last_tokens.unsqueeze(0))
    return mask


def pair_mask(rows: Tensor, indptr: Tensor, subjects: Tensor, n_queries: int) -> Tensor:
    """[n, m] true where query i is listed for row p = rows[j]: i in subjects[indptr[p]:indptr[p + 1]]."""
    first, last = indptr[rows[0]], indptr[rows[-1] + 1]
    lengths = indptr[rows + 1] - indptr[rows]  # [n]
    owner = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), lengths)
    mask = torch.zeros(rows.numel(), n_queries, dtype=torch.bool, device=rows.device)
    mask[owner, subjects[first:last]] = True
    return mask
