"""The stages of gpu_check.py on the CPU: the executor in the device's place, everything small, no clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_bodies import serve_all_by_executor
from torch import Tensor

from rep_fast.ops import scan_fused

MODEL = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 2}


def widened_product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, *, out: Any = None) -> Tensor:
    """torch.mm as GPUs have it, with results wider than its operands."""
    wide = [part.to(out_dtype) for part in (a, b)] if out_dtype is not None else [a, b]
    product = wide[0] @ wide[1]
    return product if out is None else out.copy_(product)


def widened_sum(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """torch.addmm as GPUs have it."""
    return total + widened_product(a, b, out_dtype)


@pytest.fixture
def stages(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script = load_script("gpu_stages")
    sizes = script.Sizes(
        product=32, copied=64, key_dims=(40,), subjects=(5,), key_bytes=2 * 40 * 300, checked_keys=120, chunk=128,
        small_keys=150, gate=(40, 9), gate_tokens=(1, 40), moment_tokens=130, scored=(24, 40), scored_tokens=(3,),
        model=MODEL, model_dtype=torch.float32, model_layer=1, model_tokens=300, model_subjects=(3,),
    )  # fmt: skip
    monkeypatch.setattr(script, "SIZES", sizes)
    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(script, "is_hopper", lambda: True)
    monkeypatch.setattr(script, "graphed", lambda run: run)
    monkeypatch.setattr(script, "seconds", lambda *runs, **_: [1.0 for run in runs if run() is not run])
    monkeypatch.setattr(torch, "mm", widened_product)
    monkeypatch.setattr(torch, "addmm", widened_sum)
    monkeypatch.setattr(scan_fused, "_OPENING_ROWS", 40)
    serve_all_by_executor(monkeypatch)
    return script


@pytest.fixture
def small(stages: ModuleType, load_script: Callable[[str], ModuleType]) -> ModuleType:
    """What the sanitizers look at; it takes its sizes and bodies from `stages`."""
    script = load_script("gpu_small")
    assert script.gpu_stages is stages
    return script


STAGES = (
    "ceilings", "whitened_topk", "fused_scan", "gated_adapter", "accumulate_moment", "packed_scores", "spd_solver",
    "wgmma_moment", "end_to_end", "small", "fused_small", "wgmma_small",
)  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs(stages: ModuleType, small: ModuleType, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (stages.STAGES | small.STAGES)[name]()
    lines = capsys.readouterr().out.splitlines()
    cases = [json.loads(line.removeprefix("ROW "))["case"] for line in lines if line.startswith("ROW ")]
    assert len(set(cases)) == len(cases)
    # what the sanitizers look at is not measured
    assert bool(cases) == (not name.endswith("small"))


def test_all_stages_are_tried(stages: ModuleType, small: ModuleType) -> None:
    assert sorted(stages.STAGES | small.STAGES) == sorted(STAGES)
