"""The second moment of a block of tokens beside products in torch, NumPy and BLAS.

    pytest benchmarks/bench_accumulate_moment.py --benchmark-only -n0
    rep-fast bench accumulate_moment --csv benchmarks/results/accumulate_moment.csv

The first gives pytest-benchmark's tables, the second runs the providers in turn and gives ratios and shares of the
machine's ceilings; both take providers and cases from `rep_fast.bench.accumulate_moment`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from rep_fast.bench import MomentCase
from rep_fast.bench.accumulate_moment import CASES, Inputs, providers


@cache
def inputs(case: MomentCase) -> Inputs:
    return Inputs.draw(case, seed=0)


def names() -> list[str]:
    return [provider.name for provider in providers(Inputs.draw(MomentCase("tiny", 4, 3), seed=0))]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moment(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: MomentCase, name: str) -> None:
    torch.set_num_threads(1)
    (provider,) = (one for one in providers(inputs(case)) if one.name == name)
    if provider.isa:
        monkeypatch.setenv("REP_FAST_ISA", provider.isa)
    benchmark.group = f"accumulate_moment {case}"
    benchmark.extra_info["operations"] = case.operations
    assert not provider.is_ours or inputs(case).is_exact(provider.run())
    benchmark.pedantic(provider.run, rounds=5, warmup_rounds=1)
