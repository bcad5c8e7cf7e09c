"""The two ways an op's CUDA body is tested: on a GPU, and its kernels' source on the CPU by tests/cuda_on_cpu."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rep_fast.ops import native
from rep_fast.ops.backend import Backend

_BUILD = Path(__file__).resolve().parents[1] / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"


def needs_gpu() -> None:
    """Skips unless there is a GPU and the module with kernels for it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = native.find_cuda()
    if found.module is None:
        pytest.skip(found.reason)


# op → the modules of rep_fast.ops that choose its body
CHOOSERS = {
    "accumulate_moment": ("accumulate_moment",),
    "gated_adapter": ("gated_adapter",),
    "packed_scores": ("packed_scores",),
    "spd_solver": ("cholesky", "spd_residual"),
    "whitened_topk": ("whitened_topk",),
}


@functools.cache
def executor() -> ModuleType | None:
    """The CUDA module with the executor in the device's place, which an editable installation builds; or None."""
    files = [*_BUILD.glob("_C_cuda_on_cpu.*.so")]
    if not files:
        return None
    spec = importlib.util.spec_from_file_location("_C_cuda_on_cpu", files[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def serve_by_executor(monkeypatch: pytest.MonkeyPatch, op: str, name: str | None = None) -> Backend:
    """Lets the op's module `name` (by default the op's) take the executor for its tensors on the CPU; that body."""
    module = executor()
    if module is None:
        pytest.skip("the CUDA executor is not built: pip install -e . builds it")
    assert op in module.bodies
    chosen = Backend("cuda-on-cpu", "the test runs the kernels' source on the CPU", module)
    door = sys.modules[f"rep_fast.ops.{name or op}"]
    for function in ("choose", "choose_or_warn"):
        if hasattr(door, function):
            monkeypatch.setattr(door, function, lambda *_: chosen)
    return chosen


def serve_all_by_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every op take the executor for its tensors on the CPU."""
    for op, modules in CHOOSERS.items():
        for name in modules:
            serve_by_executor(monkeypatch, op, name)
