"""One group of records under one column: edits written on top of one another, evaluated, undone (methods §6.5, §10).

Each edit is on disk before the next is made. A group that was interrupted goes on by loading its edits and applying
them in their order, so that nothing is computed twice and the model is the same bit for bit.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rep_fast.edits import AppliedEdit, Edit, undo_all
from rep_fast.evaluation.case_scorer import CASE_ERRORS, CaseScorer
from rep_fast.evaluation.protocol import Protocol
from rep_fast.evaluation.records import CaseRecord, RecordKey
from rep_fast.evaluation.regime import Regime
from rep_fast.evaluation.run_directory import RunDirectory
from rep_fast.evaluation.transform import Transform
from rep_fast.facts import EditCase
from rep_fast.models import EditableLM

# (the step's records, seed, edits of the group that are active, oldest first) → one edit of the model as it stands
WriteStep = Callable[[Sequence[EditCase], int, Sequence[Edit]], Edit]
Progress = Callable[[int, int], None]

EDIT_SECONDS = "edit_seconds"  # note that a stored edit carries


class Clock:
    """Seconds between laps, the device waited for."""

    def __init__(self, lm: EditableLM) -> None:
        self._on_gpu = lm.device.type == "cuda"
        self._last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, self._now()
        return self._last - before

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


class Work:
    """How far a run is: evaluations, and in stacked regimes edits too."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.done = 0
        self._total, self._progress = total, progress

    def skip(self, count: int = 1) -> None:
        """Count what an earlier run has done, or what a failure makes needless."""
        self.done += count

    def advance(self) -> None:
        """Count one piece of work and tell."""
        self.done += 1
        if self._progress is not None:
            self._progress(self.done, self._total)


class StoredEdits:
    """Edits of one group on disk, by their number; without a directory nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def load(self, number: int) -> Edit | None:
        """The edit of that number, None where it was not made yet.

        Raises:
            CorruptFileError: its file is damaged.
        """
        path = self._path(number)
        return Edit.load(path) if path is not None and path.exists() else None

    def save(self, number: int, edit: Edit) -> None:
        """Keep an edit; on disk it is complete before this returns.

        Raises:
            OutputError: it cannot be written.
        """
        path = self._path(number)
        if path is not None:
            edit.save(path)

    def remove(self) -> None:
        """Delete them all: the group's results are on disk."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, number: int) -> Path | None:
        return None if self._directory is None else self._directory / f"{number:06d}.safetensors"


@dataclass(frozen=True)
class Setting:
    """What all groups of a run share."""

    lm: EditableLM
    regime: Regime
    protocol: Protocol
    scorer: CaseScorer
    run: RunDirectory
    work: Work
    keep_edits: bool = False
    transform: Transform | None = None

    def keep(self, record: CaseRecord) -> None:
        """Write a record and count it."""
        self.run.append(record)
        self.work.advance()


class Group:
    """One group of cases under one column and seed.

    Args:
        stored: where its edits are kept while it runs.
    """

    def __init__(
        self,
        setting: Setting,
        cases: Sequence[EditCase],
        *,
        seed: int,
        column: str,
        write: WriteStep,
        stored: StoredEdits,
    ) -> None:
        self._setting, self._cases, self._seed, self._column = setting, cases, seed, column
        self._write_step, self._stored = write, stored
        self._evaluated_after = setting.regime.evaluated_after(len(cases))
        self._edit_seconds: dict[int, float] = {}
        self.edits: list[Edit] = []

    def evaluate(self) -> None:
        """Write, evaluate, undo; every record is kept as soon as it is known, the last one with the time of undoing."""
        steps = list(self._setting.regime.steps(self._cases))
        if self._is_finished():
            self._setting.work.skip(sum(self._evaluated_after) + self._counted(len(steps)))
        else:
            last = self._stack(steps)
            if last is not None:
                self._setting.keep(last)
        if not self._setting.keep_edits:
            self._stored.remove()

    def _stack(self, steps: Sequence[Sequence[EditCase]]) -> CaseRecord | None:
        """All steps and evaluations; returns the last record. The model is clean afterwards, whatever happens."""
        handles: list[Any] = []
        last, n_written = None, 0
        clock = Clock(self._setting.lm)
        try:
            for number, step in enumerate(steps):
                self._add(number, step, handles)
                n_written += len(step)
                if n_written in self._evaluated_after:
                    with self._transformed(handles):
                        last = self._score(n_written)
        finally:
            clock.lap()
            _undo(handles)
            undo = clock.lap()
        return None if last is None else _with_seconds(last, undo=undo / len(self._cases))

    @contextmanager
    def _transformed(self, handles: list[Any]) -> Iterator[None]:
        """With a transform of sums, its one edit stands in place of the group's edits for a while."""
        setting = self._setting
        if setting.transform is None or setting.transform.of_each or not self.edits:
            yield
            return
        with self._taken_back(handles):
            instead = self._applied(setting.transform(self.edits, setting.lm))
            try:
                yield
            finally:
                instead.undo()

    @contextmanager
    def _taken_back(self, handles: list[Any]) -> Iterator[None]:
        """The model is clean for a while; after an error it stays so."""
        _undo(handles)
        yield
        handles += map(self._applied, self.edits)

    def _transformed_update(self, edit: Edit, handles: list[Any]) -> Edit:
        """A fresh edit as the group keeps it: with a transform of updates, what that leaves of it."""
        setting = self._setting
        if setting.transform is None:
            return edit
        setting.transform.check(edit)
        if not setting.transform.of_each:
            return edit
        with self._taken_back(handles):
            clock = Clock(setting.lm)
            changed = setting.transform.change(edit, setting.lm)
            seconds = edit.notes[EDIT_SECONDS] + clock.lap()
        return dataclasses.replace(changed, notes={**changed.notes, EDIT_SECONDS: seconds})

    def _applied(self, edit: Edit) -> AppliedEdit:
        return edit.apply(self._setting.lm, self._setting.protocol.mode, compose=self._setting.protocol.compose)

    def _add(self, number: int, step: Sequence[EditCase], handles: list[Any]) -> None:
        """Put the edit of one step on top of the others; a step none of whose records can be written adds nothing."""
        setting = self._setting
        edit = self._stored.load(number)
        made = edit is None
        if edit is None:
            edit = self._made(self._askable(step))
        if edit is not None:
            if made:
                edit = self._transformed_update(edit, handles)
                self._stored.save(number, edit)
            clock = Clock(setting.lm)
            handles.append(self._applied(edit))
            self.edits.append(edit)
            seconds = edit.notes[EDIT_SECONDS] + clock.lap()
            written = [case.case_id for case in step if not self._has_failed(case)]
            self._edit_seconds |= dict.fromkeys(written, seconds / len(written))
        if self._counted(1):
            setting.work.advance() if made else setting.work.skip()

    def _askable(self, step: Sequence[EditCase]) -> list[EditCase]:
        """Records of a step that have not failed and can be evaluated; the others fail before anything is written."""
        found = []
        for case in step:
            if self._has_failed(case):
                continue
            try:
                self._setting.scorer.plan(case, self._seed)
            except CASE_ERRORS as error:
                self._fail(case, error)
            else:
                found.append(case)
        return found

    def _made(self, step: Sequence[EditCase]) -> Edit | None:
        """The edit of these records, or of those among them that can be written."""
        if not step:
            return None
        clock = Clock(self._setting.lm)
        try:
            edit = self._write(step)
        except CASE_ERRORS as error:
            if len(step) == 1:
                self._fail(step[0], error)
                return None
            writable = self._writable_alone(step)
            if len(writable) < len(step):
                return self._made(writable)
            # each can be written, together they cannot
            for case in step:
                self._fail(case, error)
            return None
        return dataclasses.replace(edit, notes={**edit.notes, EDIT_SECONDS: clock.lap()})

    def _writable_alone(self, step: Sequence[EditCase]) -> list[EditCase]:
        """Records of a failed step without those that cannot be written on their own either, which fail here."""
        found = []
        for case in step:
            try:
                self._write([case])
            except CASE_ERRORS as error:
                self._fail(case, error)
            else:
                found.append(case)
        return found

    def _write(self, step: Sequence[EditCase]) -> Edit:
        return self._write_step(step, self._seed, tuple(self.edits))

    def _score(self, n_edits: int) -> CaseRecord | None:
        """Evaluate the first `n_edits` records of the group; the last of all its records is returned, not kept."""
        setting = self._setting
        last = None
        for case in self._cases[:n_edits]:
            if self._has_failed(case):
                setting.work.advance()
                continue
            if self._key(case, n_edits) in setting.run.records:
                setting.work.skip()
                continue
            if last is not None:
                setting.keep(last)
            clock = Clock(setting.lm)
            last = setting.scorer.score(case, self._seed, **self._labels(n_edits))
            last = _with_seconds(last, edit=self._edit_seconds[case.case_id], evaluation=clock.lap())
        if last is not None and n_edits < len(self._cases):
            setting.keep(last)
            last = None
        return last

    def _fail(self, case: EditCase, error: Exception) -> None:
        labels = self._labels(len(self._cases))
        self._setting.run.append(CaseRecord(self._seed, case.case_id, failure=str(error), **labels))

    def _has_failed(self, case: EditCase) -> bool:
        record = self._setting.run.records.get(self._key(case, len(self._cases)))
        return record is not None and record.failure is not None

    def _is_finished(self) -> bool:
        return all(
            self._has_failed(case) or self._key(case, n_edits) in self._setting.run.records
            for n_edits in self._evaluated_after
            for case in self._cases[:n_edits]
        )

    def _counted(self, n_steps: int) -> int:
        """Edits count as work of their own where an evaluation does not come with each of them."""
        return n_steps if self._setting.regime.is_stacked else 0

    def _key(self, case: EditCase, n_edits: int) -> RecordKey:
        return (self._seed, case.case_id, self._column, n_edits)

    def _labels(self, n_edits: int) -> dict[str, Any]:
        return {"column": self._column, "regime": self._setting.regime.name, "n_edits": n_edits}


def _undo(handles: list[Any]) -> None:
    """Take edits back, all at once; the list is empty afterwards."""
    undo_all(handles)
    handles.clear()


def _with_seconds(record: CaseRecord, **seconds: float) -> CaseRecord:
    return dataclasses.replace(record, seconds={**record.seconds, **seconds})
