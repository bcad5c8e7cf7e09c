"""The numbers of a run: per column and metric the mean and spread over seeds, always with the protocol."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
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
        cells: column → metric → number.
        seconds: column → stage ("edit", "evaluation", "undo") → time per case.
        failures: column → messages of cases that could not be edited, with their case_id and seed.
        settings: what was run.
    """

    cells: Mapping[str, Mapping[str, Cell]]
    seconds: Mapping[str, Mapping[str, Spread]]
    failures: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[CaseRecord], *, settings: Mapping[str, Any] | None = None) -> Summary:
        """Aggregate records; columns and seeds come in the order in which they first occur."""
        by_column: dict[str, list[CaseRecord]] = {}
        for record in records:
            by_column.setdefault(record.column, []).append(record)
        return cls(
            cells={column: _cells(own) for column, own in by_column.items()},
            seconds={column: _seconds(own) for column, own in by_column.items()},
            failures={
                column: tuple(f"case {r.case_id}, seed {r.seed}: {r.failure}" for r in own if r.failure is not None)
                for column, own in by_column.items()
            },
            settings=dict(settings or {}),
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
        table = Table("metric", "protocol", *(escape(str(column)) for column in self.columns))
        # one seed has no spread to show
        spread = any(cell.std > 0 for cells in self.cells.values() for cell in cells.values())
        for name in self.metrics if metrics is None else [m for m in metrics if m in self.metrics]:
            row = [_show(cells.get(name), spread=spread) for cells in self.cells.values()]
            table.add_row(name, PROTOCOL_OF[name], *row)
        for stage in ("edit", "evaluation"):
            row = [_show_seconds(own.get(stage)) for own in self.seconds.values()]
            table.add_row(f"{stage}, median s (p90)", "", *row)
        if any(self.failures.values()):
            table.add_row("cases not edited", "", *(str(len(own)) for own in self.failures.values()))
        return table

    def to_csv(self) -> str:
        """One line per column and metric: column, metric, protocol, mean, std, n."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["column", "metric", "protocol", "mean", "std", "n"])
        for column, cells in self.cells.items():
            for name, cell in cells.items():
                writer.writerow([column, name, cell.protocol, repr(cell.mean), repr(cell.std), cell.n])
        return out.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "columns": {
                column: {name: vars(cell) for name, cell in cells.items()} for column, cells in self.cells.items()
            },
            "seconds": {
                column: {stage: vars(spread) for stage, spread in own.items()} for column, own in self.seconds.items()
            },
            "failures": {column: list(own) for column, own in self.failures.items()},
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, default=str) + "\n"


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


def _show_seconds(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.median:.3f} ({spread.p90:.3f})"
