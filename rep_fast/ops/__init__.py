"""Tensor operations: each one has a plain torch reference and, where it wins, a native body.

Nothing here knows models. `backend()` tells which body runs and why; `profile()` what the calls cost.
"""

from __future__ import annotations

from rep_fast.ops.accumulate_moment import MomentSum, accumulate_moment
from rep_fast.ops.backend import backend
from rep_fast.ops.gate_gradient import GateGradient, gate_forward, gate_gradient
from rep_fast.ops.gated_adapter import AdapterWeights, gate_logits, gated_adapter
from rep_fast.ops.kbest_paths import kbest_paths
from rep_fast.ops.packed_scores import PackedScores, packed_scores
from rep_fast.ops.profile import Call, profile
from rep_fast.ops.scan_exclusion import LastTokenExclusion, PairExclusion
from rep_fast.ops.scan_queries import ScanQueries
from rep_fast.ops.spd_solver import SolverReport, SpdSolver
from rep_fast.ops.topk_state import TopK
from rep_fast.ops.whitened_topk import whitened_topk

__all__ = [
    "AdapterWeights",
    "Call",
    "GateGradient",
    "LastTokenExclusion",
    "MomentSum",
    "PackedScores",
    "PairExclusion",
    "ScanQueries",
    "SolverReport",
    "SpdSolver",
    "TopK",
    "accumulate_moment",
    "backend",
    "gate_forward",
    "gate_gradient",
    "gate_logits",
    "gated_adapter",
    "kbest_paths",
    "packed_scores",
    "profile",
    "whitened_topk",
]
