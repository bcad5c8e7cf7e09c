"""Queries of a scan over many blocks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rep_fast.errors import HparamError
from rep_fast.ops.scan_exclusion import described


class ScanQueries:
    """Whitened queries with what the passes of `whitened_topk` need of them, kept from block to block.

    A pass reads the queries packed in panels; of a tensor they are packed anew for every block, at the cost of some
    dozens to hundreds of keys. The copy here is packed once per pass that is used, S·M bytes for int8 and four times
    that for float32. Pickles as its queries alone.

    Args:
        queries: [S, M] float32, already whitened; copied.

    Raises:
        HparamError: queries are no float32 matrix.
    """

    def __init__(self, queries: Tensor) -> None:
        if queries.dim() != 2 or queries.dtype != torch.float32:
            raise HparamError(f"ScanQueries: queries must be (queries, width) float32, got {described(queries)}")
        self._queries = {queries.device: queries.detach().clone(memory_format=torch.contiguous_format)}
        self._packings: Any = None

    def __len__(self) -> int:
        """S."""
        return len(next(iter(self._queries.values())))

    def __reduce__(self) -> tuple[type[ScanQueries], tuple[Tensor]]:
        return ScanQueries, (next(iter(self._queries.values())),)

    def on(self, device: torch.device) -> Tensor:
        """[S, M] the queries on `device`, moved there once; not to be changed."""
        if device not in self._queries:
            self._queries[device] = next(iter(self._queries.values())).to(device)
        return self._queries[device]

    def packings(self, module: ModuleType) -> Any:
        """The native module's object of packings, which fills as passes ask for them."""
        if self._packings is None:
            self._packings = module.QueryPackings(self.on(torch.device("cpu")))
        return self._packings
