from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from rep_fast.evaluation import MAIN_METRICS, CaseRecord, PromptScore, Summary


def record(seed: int, case_id: int, hit: bool, *, column: str = "rome", seconds: float = 1.0) -> CaseRecord:
    score = PromptScore((hit,), 0.5)
    scores = {group: {"new": (score,)} for group in MAIN_METRICS if group != "locality"}
    scores["locality"] = {"kept": (PromptScore((hit,), 0.5, agreement=1.0),)}
    return CaseRecord(seed, case_id, column, scores, {"edit": seconds})


@pytest.fixture
def summary() -> Summary:
    hits = {0: (1, 1, 1, 0), 1: (1, 1, 0, 0), 2: (0, 1, 0, 0)}
    records = [record(s, c, bool(hit), seconds=c + 1.0) for s, own in hits.items() for c, hit in enumerate(own)]
    records.append(CaseRecord(0, 9, "rome", failure="no target"))
    records += [record(0, 0, True, column="rome+rep")]
    return Summary.of(records, settings={"model": "tiny"})


def test_mean_and_spread_over_seeds(summary):
    cell = summary["rome"]["success"]
    assert cell.mean == pytest.approx(50.0)
    assert cell.std == pytest.approx(np.std([75.0, 50.0, 25.0]))
    assert (cell.n, cell.protocol) == (12, "REP")


def test_one_seed_has_no_spread(summary):
    assert summary["rome+rep"]["success"].std == 0.0


def test_median_and_90th_percentile_of_times(summary):
    spread = summary.seconds["rome"]["edit"]
    assert spread.median == 2.5
    assert spread.p90 == pytest.approx(np.quantile([1.0, 2.0, 3.0, 4.0] * 3, 0.9))


def test_json_names(summary):
    data = json.loads(summary.to_json())
    assert set(MAIN_METRICS) <= set(data["columns"]["rome"])
    assert set(data["columns"]["rome"]["success"]) == {"mean", "std", "n", "protocol"}


def test_csv_has_a_line_per_number(summary):
    rows = list(csv.DictReader(io.StringIO(summary.to_csv())))
    assert list(rows[0]) == [
        "regime", "measured", "n_edits", "column", "metric", "protocol", "mean", "std", "n"
    ]  # fmt: skip
    assert {(row["regime"], row["measured"], row["n_edits"]) for row in rows} == {("single", "end", "1")}
    assert len(rows) == sum(len(cells) for cells in summary.cells.values())
    own = next(row for row in rows if row["column"] == "rome" and row["metric"] == "rephrase_ood")
    assert float(own["mean"]) == summary["rome"]["rephrase_ood"].mean


def test_a_column_named_by_its_objective_keeps_its_brackets():
    record = CaseRecord(0, 1, "rome+rep[paper]", failure="not edited")
    console = Console(width=200, file=io.StringIO())
    console.print(Summary.of([record]).table())
    assert "rome+rep[paper]" in console.file.getvalue()


def test_table_shows_protocol_numbers_and_failures(summary):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary.table())
    text = console.export_text()
    assert "50.0 ± 20.4" in text
    assert "REP" in text
    assert "cases not edited" in text
    assert "rewrite_tm" not in text
    console.print(summary.table(metrics=None))
    assert "rewrite_tm" in console.export_text()


def test_column_without_a_metric_shows_a_dash(summary):
    cells = {**summary.cells, "ceiling": {}}
    table = Summary(cells, {**summary.seconds, "ceiling": {}}, {}).table()
    assert "–" in list(table.columns[-1].cells)


def stacked(case_id: int, n_edits: int, hit: bool, *, seed: int = 0) -> CaseRecord:
    scores = {"success": {"new": (PromptScore((hit,), 0.5),)}}
    return CaseRecord(seed, case_id, "rome", scores, {"edit": 1.0}, regime="sequential:2", n_edits=n_edits)


@pytest.fixture
def checkpoints() -> Summary:
    """Groups of two records and of one, evaluated after each edit: case 1 forgets, case 2 could not be written."""
    records = [stacked(0, 1, True), stacked(0, 2, False), stacked(1, 2, True), stacked(3, 1, True)]
    records.append(CaseRecord(0, 2, "rome", failure="no target", regime="sequential:2", n_edits=2))
    return Summary.of(records)


def test_the_numbers_of_a_column_are_those_of_group_ends(checkpoints):
    assert (checkpoints.regime, checkpoints.n_edits) == ("sequential:2", 2)
    assert checkpoints["rome"]["success"].n == 3
    assert checkpoints["rome"]["success"].mean == pytest.approx(200 / 3)
    assert checkpoints.failures["rome"] == ("case 2, seed 0: no target",)


def test_checkpoints_hold_what_was_measured_after_so_many_edits(checkpoints):
    points = checkpoints.checkpoints["rome"]
    assert {n: (cells["success"].mean, cells["success"].n) for n, cells in points.items()} == {
        1: (100.0, 2),
        2: (50.0, 2),
    }
    rows = list(csv.DictReader(io.StringIO(checkpoints.to_csv())))
    found = [(row["measured"], row["n_edits"], float(row["mean"])) for row in rows if row["metric"] == "success"]
    assert found == [("end", "2", pytest.approx(200 / 3)), ("checkpoint", "1", 100.0), ("checkpoint", "2", 50.0)]
    stored = json.loads(checkpoints.to_json())
    assert (stored["regime"], stored["n_edits"]) == ("sequential:2", 2)
    assert stored["checkpoints"]["rome"]["2"]["success"]["protocol"] == "REP"


def test_tables_say_regime_and_edits(checkpoints, summary):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(checkpoints.table())
    (table,) = checkpoints.checkpoint_tables()
    console.print(table)
    text = console.export_text()
    assert "regime sequential:2, 2 records written to one model" in text
    assert list(table.columns[0].cells) == ["1", "2"]
    assert list(table.columns[1].cells) == ["100.0", "50.0"]
    assert summary.checkpoint_tables() == []
    assert summary.label == "regime single, 1 record written to one model"
