"""A change of a whole weight: what fine-tuning leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rep_fast.edits.delta import check_finite_rows
from rep_fast.errors import LayerError


@dataclass(frozen=True, eq=False)
class Dense:
    """ΔW [outputs, inputs], floating point.

    Raises:
        LayerError: not a floating-point matrix. NonFiniteError: an entry is NaN or infinite.
    """

    kind: ClassVar[str] = "dense"

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or not self.matrix.is_floating_point():
            raise LayerError(
                f"a dense delta is a floating-point matrix, got {tuple(self.matrix.shape)} {self.matrix.dtype}"
            )
        check_finite_rows((self.matrix, "the delta"))

    @classmethod
    def concat(cls, deltas: Sequence[Dense]) -> Dense:
        """The sum of at least one delta, added in the order given."""
        first, *rest = deltas
        total = first.matrix
        for delta in rest:
            total = total + delta.matrix
        return cls(total)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def on_rows(self, inputs: Tensor) -> Tensor:
        """ΔW x for every row [..., inputs] → [..., outputs]."""
        return inputs.to(self.matrix) @ self.matrix.T

    def to_dense(self) -> Tensor:
        """The matrix itself."""
        return self.matrix

    def parts(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        return {"matrix": self.matrix}

    def settings(self) -> dict[str, Any]:
        """JSON values beside the tensors: none."""
        return {}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], _settings: Mapping[str, Any]) -> Dense:
        """Inverse of `parts` and `settings`."""
        return cls(parts["matrix"])

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dense:
        """The same delta on another device or in another dtype."""
        matrix = self.matrix.to(device=device, dtype=dtype)
        return self if matrix is self.matrix else Dense(matrix)  # a new one would be read through for NaN again
