"""A change of a few rows or columns of a weight, the others left as they are.

Path editing moves the key-nodes (rows of the up-projection) and value-nodes (columns of the down-projection) of a path;
knowledge neurons move single columns. Only what changes is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rep_fast.edits.delta import check_finite_rows
from rep_fast.edits.low_rank import LowRank
from rep_fast.errors import LayerError

Axis = Literal["outputs", "inputs"]


@dataclass(frozen=True, eq=False)
class Slices:
    """ΔW of a weight [outputs, inputs] that is zero outside some rows (axis "outputs") or columns (axis "inputs").

    Args:
        index: [s] int64, the rows or columns, distinct.
        values: [s, inputs] for rows, [outputs, s] for columns; floating point, same device.
        axis: "outputs" or "inputs".
        size: how many rows or columns the whole weight has.
    Raises:
        LayerError: index and values do not fit, or an index repeats or lies outside `size`.
        NonFiniteError: a value is NaN or infinite.
    """

    kind: ClassVar[str] = "slices"

    index: Tensor
    values: Tensor
    axis: Axis
    size: int

    def __post_init__(self) -> None:
        index, values = self.index, self.values
        if self.axis not in ("outputs", "inputs"):
            raise LayerError(f"slices lie along 'outputs' or 'inputs', not {self.axis!r}")
        along = 0 if self.axis == "outputs" else 1
        if index.ndim != 1 or index.dtype != torch.int64 or values.ndim != 2 or values.shape[along] != len(index):
            raise LayerError(
                f"slices along {self.axis} need index [s] int64 and values with {len(index)} of them, got "
                f"{tuple(index.shape)} {index.dtype} and {tuple(values.shape)}"
            )
        if not values.is_floating_point() or index.device != values.device:
            raise LayerError(
                f"slices need floating values on the index's device, got {values.dtype} on {values.device}"
            )
        outside, ordered = (index < 0) | (index >= self.size), index.sort().values
        is_outside, repeats = torch.stack([outside.any(), (ordered[1:] == ordered[:-1]).any()]).tolist()
        if is_outside:
            raise LayerError(f"slice {int(index[outside][0])} lies outside the {self.size} {self.axis} of the weight")
        if repeats:
            raise LayerError(f"slices along {self.axis} repeat an index; add the values up first")
        check_finite_rows((values, "the slices"))

    @classmethod
    def concat(cls, deltas: Sequence[Slices]) -> Slices:
        """The sum of deltas along one axis: an index that several have gets the sum of their values; ascending.

        Raises:
            LayerError: no deltas, or deltas of different axes or shapes.
        """
        if not deltas:
            raise LayerError("a sum of deltas needs at least one")
        axis, size = deltas[0].axis, deltas[0].size
        if any((delta.axis, delta.shape) != (axis, deltas[0].shape) for delta in deltas):
            kinds = [(delta.axis, delta.shape) for delta in deltas]
            raise LayerError(f"slices {kinds} cannot be added; they need one axis and one shape")
        along = 0 if axis == "outputs" else 1
        values = torch.cat([delta.values for delta in deltas], along)
        index, places = torch.cat([delta.index for delta in deltas]).unique(return_inverse=True)
        shape = (len(index), values.shape[1]) if axis == "outputs" else (values.shape[0], len(index))
        return cls(index, values.new_zeros(shape).index_add_(along, places, values), axis, size)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        if self.axis == "outputs":
            return self.size, self.values.shape[1]
        return self.values.shape[0], self.size

    def on_rows(self, inputs: Tensor) -> Tensor:
        """ΔW x for every row [..., inputs] → [..., outputs]; costs only the slices."""
        inputs = inputs.to(self.values)
        if self.axis == "inputs":
            return inputs[..., self.index] @ self.values.T
        moved = inputs @ self.values.T
        return moved.new_zeros(*moved.shape[:-1], self.size).index_copy(-1, self.index, moved)

    def to_dense(self) -> Tensor:
        """[outputs, inputs]."""
        dense = self.values.new_zeros(self.shape)
        return dense.index_copy(0 if self.axis == "outputs" else 1, self.index, self.values)

    def to_low_rank(self) -> LowRank:
        """The same matrix as a product, exactly: as many ranks as slices."""
        units = torch.zeros(len(self.index), self.size, dtype=self.values.dtype, device=self.values.device)
        units[torch.arange(len(self.index)), self.index] = 1
        return LowRank(units.T, self.values) if self.axis == "outputs" else LowRank(self.values, units)

    def parts(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        return {"index": self.index, "values": self.values}

    def settings(self) -> dict[str, Any]:
        """JSON values beside the tensors."""
        return {"axis": self.axis, "size": self.size}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Slices:
        """Inverse of `parts` and `settings`."""
        return cls(parts["index"], parts["values"], settings["axis"], int(settings["size"]))

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Slices:
        """The same slices on another device or in another dtype."""
        return Slices(self.index.to(device=device), self.values.to(device=device, dtype=dtype), self.axis, self.size)
