"""Best paths through independent lists: pick one node per list, scores add.

Scores add over the lists, so neither pairs nor paths are ever enumerated (methods §7.4): a heap walks the paths in
non-increasing order and each new path adds at most one node that no earlier path holds, hence N paths over L lists
touch at most L + N − 1 nodes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from rep_fast.errors import HparamError, NonFiniteError

# one list cut down to its best nodes: (score, node number), best first
_Ranked = list[tuple[float, int]]


def kbest_paths(lists: Sequence[Tensor], n: int) -> list[tuple[float, tuple[int, ...]]]:
    """Exact best `n` paths, each one node per list, by the sum of their scores.

    score(i_1 … i_P) = Σ_p lists[p][i_p] (path-editing method, methods §7.4), summed without rounding in between.

    Args:
        lists: P tensors [M_p], any real dtype; M_p may differ and may be 1.
        n: paths wanted, n >= 1.
    Returns:
        min(n, Π M_p) pairs (score, nodes), nodes in the order of `lists`, scores non-increasing. Equal scores come in
        a fixed order; inside a list the lower node number wins a tie.
    Raises:
        HparamError: n < 1, no list, an empty list, or a list that is not one-dimensional.
        NonFiniteError: a NaN or infinity in a list.
    Cost: O(Σ M_p + N·(P + log N)) after the selection of N nodes per list.
    """
    if n < 1:
        raise HparamError(f"kbest_paths: n must be at least 1, got {n}")
    if not lists:
        raise HparamError("kbest_paths: lists is empty; give one score tensor per list")
    ranked = [_best_of_list(scores, n, number) for number, scores in enumerate(lists)]
    # lists with one node offer no choice; the others by the price of their second choice, cheapest first, so that
    # every successor of a state scores no better than the state itself
    order = sorted((p for p, nodes in enumerate(ranked) if len(nodes) > 1), key=lambda p: _gap(ranked[p]))
    return _walk(ranked, order, n)


def _best_of_list(scores: Tensor, n: int, number: int) -> _Ranked:
    """The `n` best nodes of one list, best first, ties to the lower node number."""
    if scores.dim() != 1 or scores.numel() == 0:
        raise HparamError(f"kbest_paths: list {number} must be (nodes,) and not empty, got {tuple(scores.shape)}")
    values = scores.detach().to("cpu", torch.float64)
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise NonFiniteError(f"kbest_paths: list {number} holds {float(values[first])} at node {first}")
    k = min(n, values.numel())
    # topk alone breaks ties arbitrarily, so it only finds the k-th value
    candidates = (values >= torch.topk(values, k).values[-1]).nonzero().squeeze(1)
    by_score = torch.sort(values[candidates], descending=True, stable=True).indices[:k]
    nodes = candidates[by_score]
    return list(zip(values[nodes].tolist(), nodes.tolist(), strict=True))


def _gap(nodes: _Ranked) -> Fraction:
    """Price of the second choice, exact: rounded, two prices could be one number and their order be lost."""
    return Fraction(nodes[0][0]) - Fraction(nodes[1][0])


def _walk(ranked: list[_Ranked], order: list[int], n: int) -> list[tuple[float, tuple[int, ...]]]:
    """Best-first walk; a state is (list position, rank there, ranks chosen at earlier positions)."""

    def path(ranks: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        chosen = [nodes[0] for nodes in ranked]
        for position, rank in enumerate(ranks):
            chosen[order[position]] = ranked[order[position]][rank]
        return math.fsum(score for score, _ in chosen), tuple(node for _, node in chosen)

    heap: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []

    def push(earlier: tuple[int, ...], position: int, rank: int) -> None:
        if position < len(order) and rank < len(ranked[order[position]]):
            ranks = (*earlier, *([0] * (position - len(earlier))), rank)
            score, nodes = path(ranks)
            heapq.heappush(heap, (-score, nodes, ranks))

    found = [path(())]
    push((), 0, 1)
    while heap and len(found) < n:
        negated, nodes, ranks = heapq.heappop(heap)
        found.append((-negated, nodes))
        position, rank = len(ranks) - 1, ranks[-1]
        push(ranks[:-1], position, rank + 1)
        push(ranks, position + 1, 1)
        if rank == 1:
            push(ranks[:-1], position + 1, 1)
    return found
