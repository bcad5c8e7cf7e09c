"""The score `zabs` beside forming the weight gradient and reducing it.

    pytest benchmarks/bench_packed_scores.py --benchmark-only -n0
    rep-fast bench packed_scores --csv benchmarks/results/packed_scores.csv

The first gives pytest-benchmark's tables, the second runs the providers in turn and gives ratios and shares of the
machine's ceilings; both take providers and cases from `rep_fast.bench.packed_scores`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from rep_fast.bench import ScoreCase
from rep_fast.bench.packed_scores import CASES, Inputs, providers


@cache
def inputs(case: ScoreCase) -> Inputs:
    return Inputs.draw(case, seed=0)


def names() -> list[str]:
    return [provider.name for provider in providers(Inputs.draw(ScoreCase("tiny", 2, 3, 4), seed=0))]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: ScoreCase, name: str) -> None:
    torch.set_num_threads(1)
    (provider,) = (one for one in providers(inputs(case)) if one.name == name)
    if provider.isa:
        monkeypatch.setenv("REP_FAST_ISA", provider.isa)
    benchmark.group = f"packed_scores {case}"
    benchmark.extra_info["operations"] = case.operations
    assert not provider.is_ours or inputs(case).is_exact(provider.run())
    benchmark.pedantic(provider.run, rounds=5, warmup_rounds=1)
