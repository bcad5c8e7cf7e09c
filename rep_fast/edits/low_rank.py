"""A change of a linear module as a product of two thin matrices, with its algebra.

Closed-form editors write ΔW = L R with as many columns in L as facts, so a delta is stored, added and applied in its
factors; the dense [D, M] matrix is only made where somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rep_fast.edits.delta import check_finite_rows
from rep_fast.errors import LayerError


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = left · right, acting on key columns: Δv = left (right k).

    Args:
        left: [D, r] floating point.
        right: [r, M] same dtype and device.
    Raises:
        LayerError: the factors do not fit each other.
        NonFiniteError: a factor holds NaN or infinity.
    """

    kind: ClassVar[str] = "low_rank"

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise LayerError(
                f"factors of shape {tuple(left.shape)} and {tuple(right.shape)} make no delta; need [D, r] and [r, M]"
            )
        if left.dtype != right.dtype or left.device != right.device or not left.is_floating_point():
            raise LayerError(
                f"factors {left.dtype} on {left.device} and {right.dtype} on {right.device} must share one floating "
                "dtype and one device"
            )
        check_finite_rows((left, "the left factor"), (right, "the right factor"))

    @classmethod
    def concat(cls, deltas: Sequence[LowRank]) -> LowRank:
        """The sum of deltas, by stacking their factors; the rank is the sum of the ranks.

        Raises:
            LayerError: no deltas, or deltas of different widths.
        """
        if not deltas:
            raise LayerError("a sum of deltas needs at least one")
        if len({delta.shape for delta in deltas}) > 1:
            raise LayerError(f"deltas of shapes {[delta.shape for delta in deltas]} cannot be added")
        first = deltas[0]
        if len(deltas) == 1 and first.left.is_contiguous() and first.right.is_contiguous():
            return first  # a new one would be read through for NaN again
        return cls(torch.cat([delta.left for delta in deltas], 1), torch.cat([delta.right for delta in deltas], 0))

    @property
    def shape(self) -> tuple[int, int]:
        """(D, M)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns of the left factor: an upper bound of the matrix rank."""
        return self.left.shape[1]

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank.concat([self, other])

    def __neg__(self) -> LowRank:
        return LowRank(-self.left, self.right)

    def __sub__(self, other: LowRank) -> LowRank:
        return self + (-other)

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)

    __rmul__ = __mul__

    def __matmul__(self, columns: Tensor) -> Tensor:
        """ΔW K for key columns K [M] or [M, n] → [D] or [D, n]."""
        return self.left @ (self.right @ columns.to(self.right))

    def on_rows(self, keys: Tensor) -> Tensor:
        """ΔW k for every key row: [..., M] → [..., D]."""
        return keys.to(self.right) @ self.right.T @ self.left.T

    def norm(self) -> Tensor:
        """Frobenius norm, float64 scalar: ‖L R‖² = ⟨LᵀL, R Rᵀ⟩, in O((D + M) r²) without the dense matrix."""
        left, right = self.left.double(), self.right.double()
        return ((left.T @ left) * (right @ right.T)).sum().clamp(min=0.0).sqrt()

    def to_dense(self) -> Tensor:
        """[D, M], dtype of the factors."""
        return self.left @ self.right

    def parts(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        return {"left": self.left, "right": self.right}

    def settings(self) -> dict[str, Any]:
        """JSON values beside the tensors: none."""
        return {}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], _settings: Mapping[str, Any]) -> LowRank:
        """Inverse of `parts` and `settings`."""
        return cls(parts["left"], parts["right"])

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """The same delta on another device or in another dtype."""
        left, right = (part.to(device=device, dtype=dtype) for part in (self.left, self.right))
        return self if left is self.left and right is self.right else LowRank(left, right)
