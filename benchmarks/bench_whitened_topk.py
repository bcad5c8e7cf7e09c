"""The collision scan beside product and top-k in torch, NumPy and faiss.

    pytest benchmarks/bench_whitened_topk.py --benchmark-only -n0
    rep-fast bench whitened_topk --csv benchmarks/results/whitened_topk.csv

The first gives pytest-benchmark's tables, the second runs the providers in turn and gives ratios and shares of the
machine's ceilings; both take providers and cases from `rep_fast.bench.whitened_topk`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from rep_fast.bench import ScanCase
from rep_fast.bench.whitened_topk import CASES, Inputs, providers


@cache
def inputs(case: ScanCase) -> Inputs:
    return Inputs.draw(case, seed=0)


def names() -> list[str]:
    return [provider.name for provider in providers(Inputs.draw(ScanCase("tiny", 32, 2, 16), seed=0))]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: ScanCase, name: str) -> None:
    torch.set_num_threads(1)
    (provider,) = (one for one in providers(inputs(case)) if one.name == name)
    if provider.isa:
        monkeypatch.setenv("REP_FAST_ISA", provider.isa)
    benchmark.group = f"whitened_topk {case}"
    benchmark.extra_info["operations"] = case.operations
    found = benchmark.pedantic(provider.run, rounds=5, warmup_rounds=1)
    assert not provider.is_ours or inputs(case).is_exact(found)
