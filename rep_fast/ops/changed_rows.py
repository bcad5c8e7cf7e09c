"""Rows of a matrix that were added to, apart from the matrix itself."""

from __future__ import annotations

import torch
from torch import Tensor


class ChangedRows:
    """The rows of `keys` [T, M] that were moved, kept in the arithmetic's precision `dtype` (or the keys', if wider)
    until the end, so that several moves round once; nothing of the size of `keys` is made before `merged`."""

    def __init__(self, keys: Tensor, dtype: torch.dtype) -> None:
        self._keys = keys
        self._dtype = torch.promote_types(dtype, keys.dtype)
        self._places: Tensor | None = None  # [T], of each row in _values, or −1
        self._rows: list[Tensor] = []
        self._values = keys.new_empty(0, keys.shape[1], dtype=self._dtype)

    def current(self, rows: Tensor) -> Tensor:
        """The rows as they are by now, [n, M]."""
        current = self._keys[rows].to(self._dtype)
        if self._places is not None:
            known = self._places[rows] >= 0
            current[known] = self._values[self._places[rows[known]]]
        return current

    def add(self, rows: Tensor, moves: Tensor) -> None:
        """Add `moves` [n, M] to the rows, whose numbers differ."""
        if self._places is None:
            self._places = rows.new_full((self._keys.shape[0],), -1)
        new = rows[self._places[rows] < 0]
        self._places[new] = len(self._values) + torch.arange(len(new), device=rows.device)
        self._rows.append(new)
        self._values = torch.cat([self._values, self._keys[new].to(self._dtype)])
        self._values[self._places[rows]] += moves.to(self._dtype)

    def merged(self) -> Tensor:
        """All rows in the keys' dtype, contiguous; those that were not added to keep their bits, NaN payloads too."""
        merged = self._keys.clone(memory_format=torch.contiguous_format)
        if self._rows:
            merged[torch.cat(self._rows)] = self._values.to(self._keys.dtype)
        return merged
