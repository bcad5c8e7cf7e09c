"""Collisions: corpus keys that an edit would also answer to, and hard negatives drawn from them."""

from __future__ import annotations

from rep_fast.collisions.hard_negatives import CorpusSample, hard_negatives
from rep_fast.collisions.query import Query, WhitenedQueries, subject_queries, whiten_queries
from rep_fast.collisions.scan import Collision, ScanResult, ScanState, scan, scan_blocks, scan_result

__all__ = [
    "Collision",
    "CorpusSample",
    "Query",
    "ScanResult",
    "ScanState",
    "WhitenedQueries",
    "hard_negatives",
    "scan",
    "scan_blocks",
    "scan_result",
    "subject_queries",
    "whiten_queries",
]
