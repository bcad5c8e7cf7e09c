"""What a change of one linear module can be asked, whatever it is made of.

`LowRank` (closed-form editors, LoRA), `Slices` (a few rows or columns) and `Dense` (fine-tuning) are changes ΔW of a
weight [outputs, inputs]: they can be added beside it or written into it. A new kind is a class with these members and
an entry in `kinds.KINDS`, by which files know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from rep_fast.errors import NonFiniteError


class Delta(Protocol):
    """A change ΔW of one linear module.

    kind: its name in files. shape: (outputs, inputs) of the weight it belongs to.
    """

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the linear map that is changed."""
        ...

    def on_rows(self, inputs: Tensor) -> Tensor:
        """ΔW x for every row: [..., inputs] → [..., outputs], in the delta's dtype."""
        ...

    def to_dense(self) -> Tensor:
        """ΔW [outputs, inputs]."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        ...

    def settings(self) -> dict[str, Any]:
        """JSON values beside the tensors."""
        ...

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Delta:
        """Inverse of `parts` and `settings`."""
        ...

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Delta:
        """The same delta on another device or in another floating dtype."""
        ...


def check_finite_rows(*parts: tuple[Tensor, str]) -> None:
    """Refuse NaN and infinity in matrices of one device, each given with what it is; the host waits once for all.

    Raises:
        NonFiniteError: names the first bad row.
    """
    finite = [torch.isfinite(matrix).all(dim=1) for matrix, _ in parts]
    if bool(torch.cat(finite).all()):
        return
    for rows, (_, what) in zip(finite, parts, strict=True):
        if not bool(rows.all()):
            row = int((~rows).nonzero()[0])
            raise NonFiniteError(f"row {row} of {what} holds NaN or infinity; the edit cannot be used")
