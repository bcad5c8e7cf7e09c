"""The numbers of a run: per column and metric the mean and spread over seeds, always with regime and protocol."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from rep_fast.evaluation.metrics import PROTOCOL_OF, measure
from rep_fast.evaluation.records import CaseRecord

# What the table shows when nobody names metrics: the columns of the robust-editing papers.
MAIN_METRICS = (
    "success",
    "locality",
    "paraphrase",
    "rephrase_id",
    "rephrase_ood",
    "shuffle_id",
    "shuffle_ood",
    "long_id",
    "long_ood",
)


@dataclass(frozen=True)
class Cell:
    """Mean and population standard deviation over seeds, in percent; `n` prompts or records over all seeds."""

    mean: float
    std: float
    n: int
    protocol: str


@dataclass(frozen=True)
class Spread:
    """Median and 90th percentile of seconds per case."""

    median: float
    p90: float


@dataclass(frozen=True)
class Summary:
    """Result of an evaluation.

    Attributes:
        cells: column → metric → number, of each case when its group was complete.
        seconds: column → stage ("edit", "evaluation", "undo") → time per case.
        failures: column → messages of cases that could not be edited, with their case_id and seed.
        settings: what was run.
        regime: how edits were stacked, `Regime.name`.
        n_edits: records written to one model behind `cells`; the largest group's, where the last one is smaller.
        checkpoints: column → number of records written → metric → number, where groups were evaluated on their way,
            their ends among them.
        neighbours_left_out: column → neighbour prompts not asked because the record's own group edits them, over all
            records and seeds; None where that was not counted.
    """

    cells: Mapping[str, Mapping[str, Cell]]
    seconds: Mapping[str, Mapping[str, Spread]]
    failures: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    regime: str = "single"
    n_edits: int = 1
    checkpoints: Mapping[str, Mapping[int, Mapping[str, Cell]]] = field(default_factory=dict)
    neighbours_left_out: Mapping[str, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[CaseRecord], *, settings: Mapping[str, Any] | None = None) -> Summary:
        """Aggregate records; columns and seeds come in the order in which they first occur."""
        every = list(records)
        by_column: dict[str, list[CaseRecord]] = {}
        for record in _at_group_ends(every):
            by_column.setdefault(record.column, []).append(record)
        return cls(
            cells={column: _cells(own) for column, own in by_column.items()},
            seconds={column: _seconds(own) for column, own in by_column.items()},
            failures={
                column: tuple(f"case {r.case_id}, seed {r.seed}: {r.failure}" for r in own if r.failure is not None)
                for column, own in by_column.items()
            },
            settings=dict(settings or {}),
            regime=every[0].regime if every else "single",
            n_edits=max((record.n_edits for record in every), default=1),
            checkpoints=_checkpoints(every) if len(every) > sum(map(len, by_column.values())) else {},
            neighbours_left_out={column: _left_out(own) for column, own in by_column.items()},
        )

    def __getitem__(self, column: str) -> Mapping[str, Cell]:
        return self.cells[column]

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self.cells)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that at least one column has, in the order of `metrics.METRICS`."""
        present = {name for cells in self.cells.values() for name in cells}
        return [name for name in PROTOCOL_OF if name in present]

    def table(self, *, metrics: Sequence[str] | None = MAIN_METRICS) -> Table:
        """A rich table, metrics as rows and columns as columns; `metrics=None` shows all of them."""
        table = Table("metric", "protocol", *(escape(str(column)) for column in self.columns), caption=self.label)
        # one seed has no spread to show
        spread = any(cell.std > 0 for cells in self.cells.values() for cell in cells.values())
        for name in self.metrics if metrics is None else [m for m in metrics if m in self.metrics]:
            row = [_show(cells.get(name), spread=spread) for cells in self.cells.values()]
            table.add_row(name, PROTOCOL_OF[name], *row)
        for stage in ("edit", "evaluation"):
            row = [_show_seconds(own.get(stage)) for own in self.seconds.values()]
            table.add_row(f"{_STAGE_WORDS.get(stage, stage)}, median s (p90)", "", *row)
        if any(self.failures.values()):
            table.add_row("cases not edited", "", *(str(len(own)) for own in self.failures.values()))
        if any(self.neighbours_left_out.values()):
            counts = (self.neighbours_left_out.get(column) for column in self.columns)
            row = ["–" if count is None else str(count) for count in counts]
            table.add_row("neighbours not asked, their group edits them", "", *row)
        return table

    @property
    def label(self) -> str:
        """Regime and number of edits in words."""
        transform = self.settings.get("transform")
        what = "each update" if self.settings.get("transform_of_each") else "their sum"
        changed = "" if transform is None else f", {what} transformed by {transform}"
        return f"regime {self.regime}, {self.n_edits} record{'s'[: self.n_edits != 1]} written to one model{changed}"

    def checkpoint_tables(self, *, metrics: Sequence[str] | None = MAIN_METRICS) -> list[Table]:
        """Per column a table of what is left after so many edits; none where only ends of groups were evaluated."""
        shown = self.metrics if metrics is None else [name for name in metrics if name in self.metrics]
        tables = []
        for column, points in self.checkpoints.items():
            table = Table("written", *shown, title=escape(column), caption=f"regime {self.regime}")
            spread = any(cell.std > 0 for cells in points.values() for cell in cells.values())
            for n_edits, cells in points.items():
                table.add_row(str(n_edits), *(_show(cells.get(name), spread=spread) for name in shown))
            tables.append(table)
        return tables

    def to_csv(self) -> str:
        """One line per number; `measured` is "end" for all records at their group's end, "checkpoint" on the way."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["regime", "measured", "n_edits", "column", "metric", "protocol", "mean", "std", "n"])
        for measured, n_edits, column, cells in self._points():
            for name, cell in cells.items():
                place = [self.regime, measured, n_edits, column, name, cell.protocol]
                writer.writerow([*place, repr(cell.mean), repr(cell.std), cell.n])
        return out.getvalue()

    def _points(self) -> Iterator[tuple[str, int, str, Mapping[str, Cell]]]:
        for column, cells in self.cells.items():
            yield "end", self.n_edits, column, cells
        for column, points in self.checkpoints.items():
            for n_edits, cells in points.items():
                yield "checkpoint", n_edits, column, cells

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "regime": self.regime,
            "n_edits": self.n_edits,
            "columns": {column: _plain(cells) for column, cells in self.cells.items()},
            "checkpoints": {
                column: {str(n_edits): _plain(cells) for n_edits, cells in points.items()}
                for column, points in self.checkpoints.items()
            },
            "seconds": {
                column: {stage: vars(spread) for stage, spread in own.items()} for column, own in self.seconds.items()
            },
            "failures": {column: list(own) for column, own in self.failures.items()},
            "neighbours_left_out": dict(self.neighbours_left_out),
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, default=str) + "\n"


def _at_group_ends(records: Iterable[CaseRecord]) -> list[CaseRecord]:
    """The last record of each seed, case and column, in the order of the records."""
    last = {(record.seed, record.case_id, record.column): record.n_edits for record in _by_edits(records)}
    return [record for record in records if last[record.seed, record.case_id, record.column] == record.n_edits]


def _by_edits(records: Iterable[CaseRecord]) -> list[CaseRecord]:
    return sorted(records, key=lambda record: record.n_edits)


def _checkpoints(records: Iterable[CaseRecord]) -> dict[str, dict[int, dict[str, Cell]]]:
    grouped: dict[str, dict[int, list[CaseRecord]]] = {}
    for record in _by_edits(records):
        if record.failure is None:
            grouped.setdefault(record.column, {}).setdefault(record.n_edits, []).append(record)
    return {column: {n: _cells(own) for n, own in points.items()} for column, points in grouped.items()}


def _plain(cells: Mapping[str, Cell]) -> dict[str, dict[str, Any]]:
    return {name: vars(cell) for name, cell in cells.items()}


def _cells(records: Sequence[CaseRecord]) -> dict[str, Cell]:
    per_seed: dict[int, list[CaseRecord]] = {}
    for record in records:
        if record.failure is None:
            per_seed.setdefault(record.seed, []).append(record)
    measured = [measure(own) for own in per_seed.values()]
    cells = {}
    for name, protocol in PROTOCOL_OF.items():
        values = [m[name] for m in measured if name in m]
        if values:
            means = np.array([value for value, _ in values])
            cells[name] = Cell(float(means.mean()), float(means.std()), sum(n for _, n in values), protocol)
    return cells


def _left_out(records: Sequence[CaseRecord]) -> int | None:
    counts = [record.neighbours_left_out for record in records if record.failure is None]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _seconds(records: Sequence[CaseRecord]) -> dict[str, Spread]:
    stages = list(dict.fromkeys(stage for record in records for stage in record.seconds))
    spreads = {}
    for stage in stages:
        times = np.array([record.seconds[stage] for record in records if stage in record.seconds])
        spreads[stage] = Spread(float(np.median(times)), float(np.quantile(times, 0.9)))
    return spreads


def _show(cell: Cell | None, *, spread: bool) -> str:
    if cell is None:
        return "–"
    return f"{cell.mean:.1f} ± {cell.std:.1f}" if spread else f"{cell.mean:.1f}"


# a column that builds on another one shares what that one made for the same record
_STAGE_WORDS = {"edit": "edit, what is this column's own"}


def _show_seconds(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.median:.3f} ({spread.p90:.3f})"
