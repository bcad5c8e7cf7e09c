"""Results of runs in the layout of the papers' tables, the printed rows beside them.

A row is never without its model, its regime and its protocol: the papers use one word for several quantities, and a
measured number may stand next to a printed one only where a reader can see whether they mean the same.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from rep_fast.errors import CorruptFileError, HparamError, MissingFileError
from rep_fast.report.published import PublishedTable

# layout → our metric → the paper's heading
LAYOUTS: dict[str, dict[str, str]] = {
    "rep": {
        "success": "Success",
        "locality": "Locality",
        "reversion": "Reversion",
        "paraphrase": "Para.",
        "fluency": "Fluency",
        "rephrase_id": "Rephrase ID",
        "shuffle_id": "Shuffle ID",
        "long_id": "Long ID",
        "rephrase_ood": "Rephrase OOD",
        "shuffle_ood": "Shuffle OOD",
        "long_ood": "Long OOD",
    },
    "path": {
        "path_efficacy": "Efficacy",
        "path_locality": "Locality",
        "path_generality": "Generality",
        "path_score": "Score",
    },
}
# what the printed tables call our metrics, where that differs
_PRINTED_NAMES = {
    "path_efficacy": "efficacy",
    "path_locality": "locality",
    "path_generality": "generality",
    "path_score": "score",
}
MEASURED = "measured"


@dataclass(frozen=True)
class PaperRow:
    """One row: source is "measured" or the printed table's title; values: our metric → (value, std or None)."""

    source: str
    model: str
    dataset: str
    regime: str
    method: str
    protocol: str
    values: Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True)
class PaperTable:
    """Rows in one layout with the sentences that belong under them."""

    layout: str
    rows: tuple[PaperRow, ...]
    footnotes: tuple[str, ...]

    @property
    def headings(self) -> dict[str, str]:
        """Metric → heading, without the columns that no row has."""
        present = {name for row in self.rows for name in row.values}
        return {name: heading for name, heading in LAYOUTS[self.layout].items() if name in present}

    @property
    def groups(self) -> dict[str, list[PaperRow]]:
        """Rows that share source, model, data, regime and protocol, under a title that says them."""
        found: dict[str, list[PaperRow]] = {}
        for row in self.rows:
            title = f"{row.source}: {row.model}, {row.dataset}, {row.regime} ({row.protocol})"
            found.setdefault(title, []).append(row)
        return found

    def to_rich(self) -> Group:
        """For the terminal: one table per group, all with the same columns."""
        headings = self.headings
        tables = []
        for title, rows in self.groups.items():
            table = Table(title=escape(title), title_justify="left", title_style="bold")
            table.add_column("method", min_width=12)
            for heading in headings.values():
                table.add_column(heading, justify="right", min_width=8)
            for row in rows:
                table.add_row(escape(row.method), *(_shown(row.values.get(name)) for name in headings))
            tables.append(table)
        return Group(*tables)

    def to_csv(self) -> str:
        """One line per row: source, model, dataset, regime, method, protocol, then metric and metric_std pairs."""
        headings = self.headings
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = [part for name in headings for part in (name, f"{name}_std")]
        writer.writerow(["source", "model", "dataset", "regime", "method", "protocol", *names])
        for row in self.rows:
            numbers: list[str] = []
            for name in headings:
                value, std = row.values.get(name, (None, None))
                numbers += ["" if value is None else repr(value), "" if std is None else repr(std)]
            writer.writerow([row.source, row.model, row.dataset, row.regime, row.method, row.protocol, *numbers])
        return out.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = [
            {
                **{k: v for k, v in vars(row).items() if k != "values"},
                "values": {k: list(v) for k, v in row.values.items()},
            }
            for row in self.rows
        ]
        return {"layout": self.layout, "headings": self.headings, "rows": rows, "footnotes": list(self.footnotes)}


def paper_table(runs: Sequence[Mapping[str, Any]], published: Iterable[PublishedTable], *, layout: str) -> PaperTable:
    """The table of some runs and printed tables.

    Args:
        runs: contents of `summary.json`, see `read_run`.
        published: printed tables of that layout.
        layout: "rep" or "path".
    Raises:
        HparamError: unknown layout, or a printed table of another one.
    """
    if layout not in LAYOUTS:
        raise HparamError(f"layout {layout!r} is unknown; choose from {', '.join(LAYOUTS)}")
    rows = [row for run in runs for row in _measured_rows(run, layout)]
    footnotes: dict[str, None] = {}
    for printed in published:
        if printed.layout != layout:
            raise HparamError(f"{printed.name} has the layout {printed.layout!r}, not {layout!r}; choose another table")
        rows += _printed_rows(printed, layout)
        footnotes |= dict.fromkeys(f"{printed.title}: {sentence}" for sentence in printed.anomalies)
    return PaperTable(layout, tuple(rows), tuple(footnotes))


def read_run(directory: str | Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        MissingFileError: there is none. CorruptFileError: it cannot be read.
    """
    path = Path(directory) / "summary.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["columns"], dict) or not isinstance(found["settings"], dict):
            raise TypeError("columns or settings are missing")
    except FileNotFoundError:
        raise MissingFileError(
            f"{directory} holds no finished run (no summary.json); finish it with rep-fast evaluate --out … --resume"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}); run rep-fast evaluate --resume again") from None
    return found


def fitting_layout(runs: Iterable[Mapping[str, Any]]) -> str:
    """ "rep" where every run asked about rephrased subjects, which only those tables have, else "path"."""
    asked = [any("rephrase_ood" in cells for cells in run["columns"].values()) for run in runs]
    return "rep" if all(asked) else "path"


def fitting_tables(
    runs: Iterable[Mapping[str, Any]], layout: str, known: Iterable[PublishedTable]
) -> list[PublishedTable]:
    """The printed tables of that layout with a regime of these runs, superseded ones left out."""
    regimes = {_regime(run).split(":")[0] for run in runs}
    return [one for one in known if one.layout == layout and one.regime in regimes and not one.is_superseded]


def _regime(run: Mapping[str, Any]) -> str:
    return str(run["settings"].get("regime", "single"))


def _measured_rows(run: Mapping[str, Any], layout: str) -> list[PaperRow]:
    settings = run["settings"]
    seeds = settings.get("seeds", [])
    rows = []
    for column, cells in run["columns"].items():
        kept = {name: cells[name] for name in LAYOUTS[layout] if name in cells}
        protocols = dict.fromkeys(cell["protocol"] for cell in kept.values())
        # one seed has no spread
        values = {name: (cell["mean"], cell["std"] if len(seeds) > 1 else None) for name, cell in kept.items()}
        rows.append(
            PaperRow(
                source=MEASURED,
                model=Path(str(settings.get("model", "?"))).name,
                dataset=f"{settings.get('cases', '?')} cases",
                regime=_regime(run),
                method=method_label(column),
                protocol=", ".join(protocols),
                values=values,
            )
        )
    return rows


def _printed_rows(printed: PublishedTable, layout: str) -> list[PaperRow]:
    rows = []
    for row in printed.rows:
        found = {name: row.values.get(_PRINTED_NAMES.get(name, name)) for name in LAYOUTS[layout]}
        values = {name: value for name, value in found.items() if value is not None}
        rows.append(
            PaperRow(printed.title, row.model, row.dataset, printed.regime, row.method, printed.protocol, values)
        )
    return rows


def method_label(column: str) -> str:
    """A column's name as the papers print methods: "rome+rep" → "ROME+REP"."""
    special = {"alphaedit": "AlphaEdit", "lora": "LoRA"}
    return "+".join(special.get(part, part.upper()) for part in column.split("+"))


def _shown(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "–"
    return f"{value[0]:.1f}" if value[1] is None else f"{value[0]:.1f}±{value[1]:.1f}"
