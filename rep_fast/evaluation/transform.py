"""Post-processing of a group's updates: PRUNE of their sum, RECT of each as it is made (methods §5.11, §5.12).

prune       singular values held near the largest one of the weight, logarithm to base e; prune:1.2 takes another base
rect:40     the 40 % of entries that change their weight most, in proportion; rect keeps 20 %
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rep_fast.edits import Edit, accumulate, prune, rect
from rep_fast.errors import HparamError

if TYPE_CHECKING:
    from rep_fast.models import EditableLM

_WRITTEN = re.compile(r"(?P<kind>prune|rect)(:(?P<number>\d+(\.\d+)?))?")
_RECT_PERCENT = 20.0


@dataclass(frozen=True)
class Transform:
    """A post-processing of weight updates.

    Args:
        name: as `parse` reads it, and as runs are labelled.
        change: (edit, the clean model) → edit.
        of_each: done to every update when it is made, so that the next one is made on what is left of it (RECT);
            otherwise to the sum of a group's updates, which are made as ever (PRUNE).
    """

    name: str
    change: Callable[[Edit, EditableLM], Edit]
    of_each: bool = False

    @classmethod
    def parse(cls, text: str) -> Transform:
        """The transform of a name such as `rect:40`.

        Raises:
            HparamError: no such name, a base not above 1, or a share out of range.
        """
        found = _WRITTEN.fullmatch(text.strip())
        if found is None:
            raise HparamError(f"transform {text!r} is unknown; write prune, prune:1.2, rect or rect:40")
        number = None if found["number"] is None else float(found["number"])
        if found["kind"] == "prune":
            base = math.e if number is None else number
            if base <= 1.0:
                raise HparamError(f"transform {text!r}: the logarithm's base must be above 1; the paper takes e")
            return cls(found[0], lambda edit, lm: prune(edit, lm, base=base))
        percent = _RECT_PERCENT if number is None else number
        if not 0.0 < percent <= 100.0:
            raise HparamError(f"transform {text!r}: keep more than 0 and up to 100 percent of the entries")
        return cls(found[0], lambda edit, lm: rect(edit, lm, share=percent / 100.0), of_each=True)

    def check(self, edit: Edit) -> None:
        """Refuse an edit whose weights it would leave as they are.

        Raises:
            HparamError: no module has a delta.
        """
        if edit.modules and all(module.delta is None for module in edit.modules):
            raise HparamError(
                f"transform {self.name!r} works on changes of weights and {edit.method!r} makes none; leave the "
                "transform or the method out"
            )

    def __call__(self, edits: Sequence[Edit], lm: EditableLM) -> Edit:
        """One edit in place of these, which were made one after another and not transformed yet.

        Args:
            lm: the clean model.
        Raises:
            HparamError, LayerError: see `check`, `accumulate`, `prune` and `rect`.
        """
        for edit in edits:
            self.check(edit)
        if not self.of_each:
            return self.change(accumulate(edits), lm)
        made = accumulate([self.change(edit, lm) for edit in edits])
        return replace(made, notes={**made.notes, "transform": self.name})
