"""Solves with a second moment beside inverse, LU and Cholesky in torch and SciPy.

    pytest benchmarks/bench_spd_solver.py --benchmark-only -n0
    rep-fast bench spd_solver --csv benchmarks/results/spd_solver.csv

The first gives pytest-benchmark's tables, the second runs the providers in turn and gives ratios and shares of the
machine's ceilings; both take providers and cases from `rep_fast.bench.spd_solver`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from rep_fast.bench import SolveCase
from rep_fast.bench.spd_solver import CASES, Inputs, providers


@cache
def inputs(case: SolveCase) -> Inputs:
    return Inputs.draw(case, seed=0)


def runs() -> list[tuple[SolveCase, str]]:
    """Every case with the names of its providers, which depend on whether the factor is cached."""
    tiny = {cached: Inputs.draw(SolveCase("tiny", 4, cached), seed=0) for cached in (False, True)}
    return [(case, provider.name) for case in CASES for provider in providers(tiny[case.is_cached])]


@pytest.mark.parametrize(("case", "name"), runs(), ids=str)
def test_solve(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: SolveCase, name: str) -> None:
    torch.set_num_threads(1)
    (provider,) = (one for one in providers(inputs(case)) if one.name == name)
    if provider.isa:
        monkeypatch.setenv("REP_FAST_ISA", provider.isa)
    benchmark.group = f"spd_solver {case}"
    benchmark.extra_info["operations"] = case.operations
    found = benchmark.pedantic(provider.run, rounds=3, warmup_rounds=1)
    assert "refined" not in name or inputs(case).is_exact(found)
