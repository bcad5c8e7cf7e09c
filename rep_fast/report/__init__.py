"""The HTML report: plain data in, one self-contained page out."""

from __future__ import annotations

from rep_fast.report.data import (
    Answered,
    CollisionRow,
    EditedFact,
    LayerScores,
    MetricRow,
    ReportData,
    Similarities,
)
from rep_fast.report.page import render, write_report

__all__ = [
    "Answered",
    "CollisionRow",
    "EditedFact",
    "LayerScores",
    "MetricRow",
    "ReportData",
    "Similarities",
    "render",
    "write_report",
]
