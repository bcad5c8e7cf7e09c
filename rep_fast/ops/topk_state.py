"""The running state of a collision scan: the best hits of each query among the keys seen so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.errors import HparamError
from rep_fast.reference.whitened_topk import select_best

# how pairs are ruled out, in the order of the native module's `scan_passes`
PASSES = ("fp64", "fp32", "bf16", "bf16x2", "int8")
# why, in the order of its `pass_reasons`
REASONS = (
    "asked for by name",
    "the only pass for these keys and this processor",
    "fastest by the rates measured here",
    "int8 would let too many pairs through, by a sample",
    "int8 let too many pairs through",
)
_STATE_TENSORS = ("counts", "dropped_queries", "exact_scores", "ids", "pass_counts", "reason_counts")


@dataclass(frozen=True)
class TopK:
    """The best k hits of each query among the keys seen so far.

    States of disjoint sets of keys merge in any order and grouping to the same bits, so blocks, threads, processes and
    machines combine by `merge`.

    Attributes:
        exact_scores: [S, k] float64, descending; −∞ where there is no hit.
        ids: [S, k] int64; −1 where there is no hit; equal scores stand in the order of their ids.
        n_keys_seen: keys fed in, dropped ones included.
        n_nonfinite: keys dropped for a NaN or infinity (only with nonfinite="exclude").
        dropped_queries: [S] bool, queries left out for a NaN or infinity (only with nonfinite="exclude").
        pass_counts: keys that each of `PASSES` went over; the choice changes the cost, never the hits.
        reason_counts: the same keys by why their pass was taken, one of `REASONS`.
    """

    exact_scores: Tensor
    ids: Tensor
    n_keys_seen: int
    n_nonfinite: int
    dropped_queries: Tensor
    pass_counts: tuple[int, ...] = (0,) * len(PASSES)
    reason_counts: tuple[int, ...] = (0,) * len(REASONS)

    @staticmethod
    def empty(n_queries: int, k: int, *, device: torch.device | str = "cpu") -> TopK:
        """The state before any key: merging it changes nothing.

        Raises:
            HparamError: k < 1 or n_queries < 0.
        """
        if k < 1 or n_queries < 0:
            raise HparamError(f"TopK: needs k >= 1 and n_queries >= 0, got k={k}, n_queries={n_queries}")
        return TopK(
            exact_scores=torch.full((n_queries, k), -torch.inf, dtype=torch.float64, device=device),
            ids=torch.full((n_queries, k), -1, dtype=torch.int64, device=device),
            n_keys_seen=0,
            n_nonfinite=0,
            dropped_queries=torch.zeros(n_queries, dtype=torch.bool, device=device),
        )

    @property
    def k(self) -> int:
        """Hits kept per query."""
        return self.ids.shape[1]

    @property
    def scores(self) -> Tensor:
        """[S, k] float32: the exact scores, rounded once."""
        return self.exact_scores.float()

    @property
    def reason(self) -> str:
        """Which passes ran, over how many keys, and why; "" before any key."""
        passes = _listed(PASSES, self.pass_counts)
        return f"{passes}: {_listed(REASONS, self.reason_counts)}" if passes else ""

    def merge(self, other: TopK) -> TopK:
        """The state of both sets of keys together; an id must not occur in both.

        Raises:
            HparamError: the states differ in queries or k.
        """
        if self.ids.shape != other.ids.shape:
            raise HparamError(f"TopK.merge: (queries, k) differ, {tuple(self.ids.shape)} and {tuple(other.ids.shape)}")
        scores, ids = select_best(
            torch.cat([self.exact_scores, other.exact_scores], 1), torch.cat([self.ids, other.ids], 1), self.k
        )
        return TopK(
            exact_scores=scores,
            ids=ids,
            n_keys_seen=self.n_keys_seen + other.n_keys_seen,
            n_nonfinite=self.n_nonfinite + other.n_nonfinite,
            dropped_queries=self.dropped_queries | other.dropped_queries,
            pass_counts=sums(self.pass_counts, other.pass_counts),
            reason_counts=sums(self.reason_counts, other.reason_counts),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors, for safetensors."""
        return {
            "counts": torch.tensor([self.n_keys_seen, self.n_nonfinite]),
            "dropped_queries": self.dropped_queries,
            "exact_scores": self.exact_scores,
            "ids": self.ids,
            "pass_counts": torch.tensor(self.pass_counts),
            "reason_counts": torch.tensor(self.reason_counts),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> TopK:
        """The state `to_tensors` gave.

        Raises:
            HparamError: a tensor is missing or has another shape or dtype.
        """
        if sorted(tensors) != list(_STATE_TENSORS):
            raise HparamError(f"TopK: needs the tensors {', '.join(_STATE_TENSORS)}, got {', '.join(sorted(tensors))}")
        counts, dropped, scores, ids, passes, reasons = (tensors[name] for name in _STATE_TENSORS)
        shapes_fit = scores.dim() == 2 and scores.shape == ids.shape and dropped.shape == scores.shape[:1]
        shapes_fit = shapes_fit and counts.shape == (2,)
        shapes_fit = shapes_fit and passes.shape == (len(PASSES),) and reasons.shape == (len(REASONS),)
        integers_fit = all(tensor.dtype == torch.int64 for tensor in (counts, ids, passes, reasons))
        if not shapes_fit or not integers_fit or (dropped.dtype, scores.dtype) != (torch.bool, torch.float64):
            described = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(tensors.items()))
            raise HparamError(f"TopK: the tensors do not fit together: {described}")
        n_keys_seen, n_nonfinite = counts.tolist()
        return TopK(scores, ids, n_keys_seen, n_nonfinite, dropped, tuple(passes.tolist()), tuple(reasons.tolist()))


def sums(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """Entry by entry."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _listed(names: Sequence[str], counts: Sequence[int]) -> str:
    """The names that occur, each with its number of keys where there are several."""
    found = [(name, count) for name, count in zip(names, counts, strict=True) if count]
    return ", ".join(name if len(found) == 1 else f"{name} ({count} keys)" for name, count in found)
