"""The gated key adapter beside the eager torch module.

    pytest benchmarks/bench_gated_adapter.py --benchmark-only -n0
    rep-fast bench gated_adapter --csv benchmarks/results/gated_adapter.csv

The first gives pytest-benchmark's tables, the second runs the providers in turn and gives ratios and shares of the
machine's ceilings; both take providers and cases from `rep_fast.bench.gated_adapter`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from rep_fast.bench import GateCase
from rep_fast.bench.gated_adapter import CASES, Inputs, providers


@lru_cache(maxsize=1)  # a case's weights fill a good part of the memory
def inputs(case: GateCase) -> Inputs:
    return Inputs.draw(case, seed=0)


def names() -> list[str]:
    return [provider.name for provider in providers(Inputs.draw(GateCase("tiny", 2, 16, 3), seed=0))]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(benchmark: Any, monkeypatch: pytest.MonkeyPatch, case: GateCase, name: str) -> None:
    torch.set_num_threads(1)
    (provider,) = (one for one in providers(inputs(case)) if one.name == name)
    if provider.isa:
        monkeypatch.setenv("REP_FAST_ISA", provider.isa)
    benchmark.group = f"gated_adapter {case}"
    benchmark.extra_info["operations"] = case.operations
    found = benchmark.pedantic(provider.run, rounds=5, warmup_rounds=1)
    assert inputs(case).is_exact(found)
