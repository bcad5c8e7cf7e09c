"""Queries of a scan over many blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rep_fast.errors import HparamError
from rep_fast.ops.scan_exclusion import described
from rep_fast.ops.scan_products import PreparedQueries


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
        self._prepared: dict[Hashable, PreparedQueries] = {}

    @property
    def home(self) -> torch.device:
        """The device they were made on."""
        return next(iter(self._queries))

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

    def prepared(self, how: Hashable, prepare: Callable[[], PreparedQueries]) -> PreparedQueries:
        """What `prepare` makes of the queries for a pass on a GPU, made once for each `how`."""
        if how not in self._prepared:
            self._prepared[how] = prepare()
        return self._prepared[how]
