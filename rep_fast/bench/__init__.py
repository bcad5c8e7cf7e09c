"""Benchmarks of the ops beside their peers, as `rep-fast bench` runs them."""

from __future__ import annotations

from rep_fast.bench import accumulate_moment, gated_adapter, packed_scores, spd_solver, whitened_topk
from rep_fast.bench.cases import GateCase, MomentCase, ScanCase, ScoreCase, SolveCase
from rep_fast.bench.ceilings import Ceilings
from rep_fast.bench.interleaved import Provider, Row, measure, write_csv
from rep_fast.bench.machine import about_this_machine

# op → module with CASES and providers(case)
OPS = {
    "accumulate_moment": accumulate_moment,
    "gated_adapter": gated_adapter,
    "packed_scores": packed_scores,
    "spd_solver": spd_solver,
    "whitened_topk": whitened_topk,
}

__all__ = [
    "OPS",
    "Ceilings",
    "GateCase",
    "MomentCase",
    "Provider",
    "Row",
    "ScanCase",
    "ScoreCase",
    "SolveCase",
    "about_this_machine",
    "measure",
    "write_csv",
]
