"""Benchmarks of the ops beside their peers, as `rep-fast bench` runs them."""

from __future__ import annotations

from rep_fast.bench import gated_adapter, whitened_topk
from rep_fast.bench.cases import GateCase, ScanCase
from rep_fast.bench.ceilings import Ceilings
from rep_fast.bench.interleaved import Provider, Row, measure, write_csv
from rep_fast.bench.machine import about_this_machine

# op → module with CASES and providers(case)
OPS = {"gated_adapter": gated_adapter, "whitened_topk": whitened_topk}

__all__ = ["OPS", "Ceilings", "GateCase", "Provider", "Row", "ScanCase", "about_this_machine", "measure", "write_csv"]
