"""What replaces a module's output instead of adding to its weight.

`Codebook` (GRACE) and `SideMemory` (WISE) look at a prompt, decide for its row, and put something else in the place of
what the module gave. They share with a `Delta` how they are stored, but no ΔW says what they do: they always run by
hook. A new kind is a class with these members and an entry in `kinds.REPLACEMENTS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from rep_fast.models import ForwardPass

Kind = TypeVar("Kind", bound="Replacement")
# in place of an entry's number: the row keeps what the module gave
UNTOUCHED = -1


class Replacement(Protocol):
    """A rule that replaces outputs of one linear module, row by row.

    It holds what was written, in order; what acts follows from that. So the edits of one module can come and go in any
    order: `stacked` makes of those that are active what one edit would be that had written all of it.
    """

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs) of the weight it belongs to."""
        ...

    @classmethod
    def stacked(cls: type[Kind], made: Sequence[Kind]) -> Kind:
        """Several, made one after another at the same module, as one.

        Raises:
            HparamError: they do not follow one rule.
        """
        ...

    def decide(self, inputs: Tensor, output: Tensor, told: ForwardPass) -> Tensor:
        """[n] int64: which entry acts on each row, `UNTOUCHED` for none.

        inputs: [n, T, inputs], output: [n, T, outputs] of the whole prompts, in the replacement's dtype.
        """
        ...

    def replaced(self, inputs: Tensor, output: Tensor, decided: Tensor, told: ForwardPass) -> Tensor:
        """[n, T, outputs]: the output of a pass, or of a later step of one, with what was decided put in."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        ...

    def settings(self) -> dict[str, Any]:
        """JSON values beside the tensors."""
        ...

    @classmethod
    def from_parts(cls: type[Kind], parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Kind:
        """Inverse of `parts` and `settings`."""
        ...

    def to(self: Kind, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Kind:
        """The same on another device or in another floating dtype."""
        ...
