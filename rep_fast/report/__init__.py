"""The HTML report: plain data in, one self-contained page out."""

from __future__ import annotations

from rep_fast.report.data import (
    Answered,
    CollisionRow,
    Curves,
    EditedFact,
    LayerScores,
    MetricRow,
    ReportData,
    Similarities,
)
from rep_fast.report.page import render, render_table, write_report
from rep_fast.report.paper_tables import PaperTable, paper_table, read_run

__all__ = [
    "Answered",
    "CollisionRow",
    "Curves",
    "EditedFact",
    "LayerScores",
    "MetricRow",
    "PaperTable",
    "ReportData",
    "Similarities",
    "paper_table",
    "read_run",
    "render",
    "render_table",
    "write_report",
]
