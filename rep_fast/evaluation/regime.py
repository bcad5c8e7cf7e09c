"""Regimes: how many records one edit writes, and how many edits stand on the model before it is clean again (§10).

single            one record, evaluated, undone
batch:100         100 records by one edit, evaluated, undone
sequential:200    200 edits of one record on top of one another, then all evaluated and undone
cumulative:100    all records in edits of 100 on the running model, all evaluated at the end
joint-epochs      all records by one edit of an editor that optimises over the whole set
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from rep_fast.errors import HparamError

T = TypeVar("T")

_WRITTEN = re.compile(r"(?P<kind>[a-z-]+)(:(?P<size>-?\d+))?")
_EXAMPLES = "single, batch:100, sequential:200, sequential, cumulative:100 or joint-epochs"


@dataclass(frozen=True)
class Regime:
    """How records are grouped and edits stacked.

    Records are cut into groups in their order. Inside a group each edit writes `step` records on top of the edits
    before it; when all are written the group's records are evaluated, and then all its edits undone.

    Args:
        name: as `parse` reads it, and as results are labelled.
        group: records per clean model; None: all of them.
        step: records per edit; None: the whole group.
        evaluate_every: also evaluate after every so many edits of a group, the records written so far.
    Raises:
        HparamError: a size below 1, a step larger than its group, or an `evaluate_every` that never comes.
    """

    name: str
    group: int | None
    step: int | None
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        for what in ("group", "step", "evaluate_every"):
            size = getattr(self, what)
            if size is not None and size < 1:
                raise HparamError(f"{what} of regime {self.name!r} is {size}; it must be 1 or more")
        if self.group is not None and self.step is not None and self.step > self.group:
            raise HparamError(
                f"regime {self.name!r} writes {self.step} records at once into groups of {self.group}; "
                "make the step at most as large as the group"
            )
        if self.evaluate_every is None:
            return
        edits = 1 if self.step is None else None if self.group is None else -(-self.group // self.step)
        if edits is not None and self.evaluate_every >= edits:
            raise HparamError(
                f"regime {self.name!r} is evaluated after its {edits} edit{'s'[: edits != 1]} anyway; evaluate_every="
                f"{self.evaluate_every} needs longer groups of sequential or cumulative"
            )

    @classmethod
    def single(cls) -> Regime:
        """Every record on the clean model (REP)."""
        return cls("single", group=1, step=1)

    @classmethod
    def batch(cls, size: int) -> Regime:
        """Groups of `size` records, each written by one edit."""
        return cls(f"batch:{size}", group=size, step=size)

    @classmethod
    def sequential(cls, size: int | None = None, *, evaluate_every: int | None = None) -> Regime:
        """Groups of `size` records (None: all of them), one edit each, none undone before the group's end."""
        name = "sequential" if size is None else f"sequential:{size}"
        return cls(name, group=size, step=1, evaluate_every=evaluate_every)

    @classmethod
    def cumulative(cls, size: int, *, evaluate_every: int | None = None) -> Regime:
        """All records on one running model, `size` of them per edit."""
        return cls(f"cumulative:{size}", group=None, step=size, evaluate_every=evaluate_every)

    @classmethod
    def joint_epochs(cls) -> Regime:
        """All records by one edit, as path editing optimises them: over the whole set, epoch after epoch."""
        return cls("joint-epochs", group=None, step=None)

    @classmethod
    def parse(cls, text: str, *, evaluate_every: int | None = None) -> Regime:
        """The regime of a name such as `batch:100`.

        Raises:
            HparamError: no such kind, a size missing or out of range, or as the class itself.
        """
        found = _WRITTEN.fullmatch(text.strip())
        kind = found["kind"] if found else None
        size = int(found["size"]) if found and found["size"] else None
        unsized = {"single": cls.single, "joint-epochs": cls.joint_epochs}
        sized = {"batch": cls.batch, "sequential": cls.sequential, "cumulative": cls.cumulative}
        if kind in unsized and size is None:
            made = unsized[kind]()
        elif kind in sized and size is not None:
            made = sized[kind](size)
        elif kind == "sequential":
            made = cls.sequential()
        else:
            raise HparamError(f"regime {text!r} is unknown; write {_EXAMPLES}")
        return dataclasses.replace(made, evaluate_every=evaluate_every)

    @property
    def is_stacked(self) -> bool:
        """Whether more than one record is written to a model before it is clean again."""
        return self.group != 1

    def groups(self, records: Sequence[T]) -> Iterator[Sequence[T]]:
        """The records of each clean model, in their order; the last group may be smaller."""
        return _cut(records, self.group)

    def steps(self, group: Sequence[T]) -> Iterator[Sequence[T]]:
        """The records of each edit of a group."""
        return _cut(group, self.step)

    def evaluated_after(self, n_records: int) -> tuple[int, ...]:
        """After how many written records a group of `n_records` is evaluated, in ascending order."""
        ends = list(accumulate(len(step) for step in self.steps(range(n_records))))
        chosen = ends[self.evaluate_every - 1 :: self.evaluate_every] if self.evaluate_every else []
        return tuple(sorted({*chosen, n_records}))

    def note(self, n_records: int) -> str | None:
        """One sentence where the records do not fill the groups; None where they do."""
        if self.group is None or n_records % self.group == 0:
            return None
        if n_records < self.group:
            return f"regime {self.name}: there are only {n_records} records, they make one group"
        return f"regime {self.name}: the last group has {n_records % self.group} records instead of {self.group}"


def _cut(records: Sequence[T], size: int | None) -> Iterator[Sequence[T]]:
    size = size or max(1, len(records))
    return (records[begin : begin + size] for begin in range(0, len(records), size))
