"""A collision scan's state on a GPU, whose counters wait there until somebody reads a result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rep_fast.ops.topk_state import TopK

# of the keys that were dropped: how many, the lowest id, and that key's row in its block
N_COUNTERS = 3
_NO_ID = torch.iinfo(torch.int64).max


class UnreadTopK(TopK):
    """A `TopK` whose kernels may still be running.

    `k`, `n_keys_seen`, `pass_counts` and `reason_counts` are known; everything else is read from the device when it is
    first asked for, and what the scan must refuse is raised then. Feeding it to the next block reads nothing, so that
    blocks follow each other without waiting. Pickles as the plain state.

    Args:
        hits: the state with n_nonfinite of keys that were counted before.
        counters: [N_COUNTERS] int64 on the device, since then; `no_counters` gives the first.
        refuse: raises for (keys dropped, lowest id among them, its row, dropped queries); None: nothing is refused.
    """

    def __init__(self, hits: TopK, counters: Tensor, refuse: Callable[[int, int, int, Tensor], None] | None) -> None:
        # the base is frozen
        self.__dict__.update(unread=hits, counters=counters, _refuse=refuse, _read=None)

    unread: TopK
    counters: Tensor

    def _settled(self) -> TopK:
        read: TopK | None = self.__dict__["_read"]
        if read is None:
            n_nonfinite, first_id, row = self.counters.tolist()
            hits, refuse = self.unread, self.__dict__["_refuse"]
            if refuse is not None:
                refuse(n_nonfinite, first_id, row, hits.dropped_queries)
            read = TopK(
                exact_scores=hits.exact_scores,
                ids=hits.ids,
                n_keys_seen=hits.n_keys_seen,
                n_nonfinite=hits.n_nonfinite + n_nonfinite,
                dropped_queries=hits.dropped_queries,
                pass_counts=hits.pass_counts,
                reason_counts=hits.reason_counts,
            )
            self.__dict__["_read"] = read
        return read

    @property
    def k(self) -> int:
        """Hits kept per query."""
        return self.unread.k

    @property
    def n_keys_seen(self) -> int:  # type: ignore[override]  # the base's field never changes either
        """Keys fed in."""
        return self.unread.n_keys_seen

    @property
    def pass_counts(self) -> tuple[int, ...]:  # type: ignore[override]
        """Keys that each pass went over."""
        return self.unread.pass_counts

    @property
    def reason_counts(self) -> tuple[int, ...]:  # type: ignore[override]
        """Those keys by why their pass was taken."""
        return self.unread.reason_counts

    @property
    def exact_scores(self) -> Tensor:  # type: ignore[override]
        """[S, k] float64; waits for the device."""
        return self._settled().exact_scores

    @property
    def ids(self) -> Tensor:  # type: ignore[override]
        """[S, k] int64; waits for the device."""
        return self._settled().ids

    @property
    def n_nonfinite(self) -> int:  # type: ignore[override]
        """Keys dropped; waits for the device."""
        return self._settled().n_nonfinite

    @property
    def dropped_queries(self) -> Tensor:  # type: ignore[override]
        """[S] bool; waits for the device."""
        return self._settled().dropped_queries

    def __reduce__(self) -> tuple[type[TopK], tuple[object, ...]]:
        read = self._settled()
        return TopK, tuple(read.__dict__[name] for name in TopK.__dataclass_fields__)


def no_counters(device: torch.device) -> Tensor:
    """Counters of a scan that dropped nothing, made without waiting for the device."""
    counters = torch.full((N_COUNTERS,), _NO_ID, dtype=torch.int64, device=device)
    counters[0] = 0
    return counters


def with_block(counters: Tensor, n_nonfinite: Tensor, first_row: Tensor, first_id: int) -> Tensor:
    """The counters after a block that dropped `n_nonfinite` [] keys, the first of them in `first_row` [] (−1: none)."""
    block_id = torch.where(first_row >= 0, first_row + first_id, _NO_ID)
    is_first = block_id < counters[1]
    return torch.stack(
        [
            counters[0] + n_nonfinite,
            torch.where(is_first, block_id, counters[1]),
            torch.where(is_first, first_row, counters[2]),
        ]
    )
