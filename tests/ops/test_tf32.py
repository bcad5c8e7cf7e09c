"""Products that must be float32 stay so, or become float64, where torch may round their operands to TF32."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from cuda_bodies import needs_gpu
from gate_checks import logit_bound, random_adapter, random_keys

from rep_fast.ops import AdapterWeights, MomentSum, accumulate_moment, gate_logits, gates_on_gpu, tf32
from rep_fast.ops.backend import Backend
from rep_fast.ops.tf32 import is_tf32_allowed
from rep_fast.reference import gated_adapter as reference

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("of_all", "of_products", "is_allowed"),
    [("none", "none", False), ("none", "tf32", True), ("tf32", "none", True), ("tf32", "ieee", False)],
)
def test_what_torch_was_told(monkeypatch: pytest.MonkeyPatch, of_all: str, of_products: str, is_allowed: bool) -> None:
    of_cuda = SimpleNamespace(matmul=SimpleNamespace(fp32_precision=of_products))
    told = SimpleNamespace(backends=SimpleNamespace(fp32_precision=of_all, cuda=of_cuda))
    monkeypatch.setattr(tf32, "torch", told)
    assert is_tf32_allowed(CUDA) == is_allowed
    assert not is_tf32_allowed(CPU)


def test_the_older_way_of_telling_it() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert is_tf32_allowed(CUDA)
        torch.set_float32_matmul_precision("highest")
        assert not is_tf32_allowed(CUDA)
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_are_then_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 + 2⁻²³)², whose last bits float32 does not hold."""
    value = 1 + 2.0**-23
    plain = Backend("reference", "as float32 keys have it on a GPU")
    monkeypatch.setattr(sys.modules["rep_fast.ops.accumulate_moment"], "_body", lambda _: plain)
    for module in ("accumulate_moment", "gates_on_gpu"):
        monkeypatch.setattr(sys.modules[f"rep_fast.ops.{module}"], "is_tf32_allowed", lambda _: True)
    total = accumulate_moment(MomentSum.zeros(2), torch.full((3, 2), value))
    assert total.lower[1, 0] == 3 * value**2
    # 2²⁴ + 1 − 2²⁴: float32 sums lose the one
    keys, w1 = torch.tensor([[2.0**12, 1.0, 2.0**12]]), torch.tensor([[2.0**12, 1.0, -(2.0**12)]])
    assert gates_on_gpu._products(keys, w1).tolist() == [[1.0]]


@pytest.mark.parametrize("n_tokens", [1, 100])
def test_tf32_changes_nothing_on_a_gpu(n_tokens: int) -> None:
    needs_gpu()
    adapter, keys = random_adapter(256, 40), random_keys(n_tokens, 256)
    mine = AdapterWeights(*(part.cuda() for part in adapter))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        error = (gate_logits(keys.cuda(), mine).cpu().double() - reference.gate_logits(keys, adapter)).abs()
        total = accumulate_moment(MomentSum.zeros(256, device="cuda"), keys.cuda())
    finally:
        torch.set_float32_matmul_precision(before)
    assert bool((error <= logit_bound(keys, adapter)).all())
    wide = keys.double()
    # float32 products of n tokens in a chain
    bound = (n_tokens + 1) * 2.0**-23 * (wide.abs().T @ wide.abs())
    assert bool(((total.lower.cpu() - wide.T @ wide).tril().abs() <= bound).all())
