"""Second moments on a GPU: 16-bit keys by the kernel, others by torch."""

from __future__ import annotations

import pytest
import torch
from cuda_bodies import needs_gpu, serve_by_executor
from moment_checks import HALVES, assert_is_moment, random_keys

from rep_fast.errors import NonFiniteError
from rep_fast.ops import MomentSum, accumulate_moment, profile

# (tokens, width): ones, primes, beside the tile of 128 and the chain of 512 tokens
SHAPES = ((1, 1), (3, 47), (63, 129), (515, 17))


@pytest.fixture(params=["cuda", "cuda-on-cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where tensors lie that the CUDA body serves."""
    if request.param == "cuda":
        needs_gpu()
        return torch.device("cuda")
    serve_by_executor(monkeypatch, "accumulate_moment")
    return torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_against_float64(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    keys = random_keys(*shape, dtype)
    total = MomentSum.zeros(shape[1], device=device)
    total.lower += torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(1)).to(device)
    before = total.lower.cpu().clone()
    with profile() as calls:
        accumulate_moment(total, keys.to(device))
    assert calls[0].backend.startswith("cuda")
    assert total.count == shape[0]
    assert_is_moment(total, before, keys)
    assert torch.equal(total.lower.cpu().triu(1), before.triu(1))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_padded_rows_columns_and_mask(device: torch.device, dtype: torch.dtype) -> None:
    padded = random_keys(2 * 71, 60, dtype).to(device)
    keys, mask = padded[::2, 5:56], torch.arange(71, device=device) % 3 == 1
    nothing = torch.zeros(51, 51, dtype=torch.float64)
    whole, masked, transposed = (MomentSum.zeros(51, device=device) for _ in range(3))
    assert_is_moment(accumulate_moment(whole, keys), nothing, keys.cpu())
    assert_is_moment(accumulate_moment(masked, keys, mask=mask), nothing, keys[mask].cpu())
    assert masked.count == int(mask.sum())
    assert torch.equal(accumulate_moment(transposed, keys.T.contiguous().T).lower, whole.lower)


def test_nonfinite_keys(device: torch.device) -> None:
    keys = random_keys(60, 6, torch.bfloat16)
    keys[40, 4], keys[50, 0] = torch.nan, torch.inf
    total = MomentSum.zeros(6, device=device)
    accumulate_moment(total, keys.to(device), nonfinite="exclude")
    assert (total.count, total.n_nonfinite) == (58, 2)
    kept = torch.isfinite(keys).all(dim=1)
    assert_is_moment(total, torch.zeros(6, 6, dtype=torch.float64), keys[kept])
    accumulate_moment(total, keys.to(device), mask=kept.to(device))
    assert (total.count, total.n_nonfinite) == (116, 2)


def test_nonfinite_keys_are_refused_when_the_sum_is_read(device: torch.device) -> None:
    """And each time it is: the sum lacks tokens that were to count."""
    keys = random_keys(60, 6, torch.bfloat16)
    keys[40, 4], keys[50, 0] = torch.nan, torch.inf
    for mask, row in ((torch.ones(60, dtype=torch.bool), 40), (torch.arange(60) > 40, 50)):
        total = accumulate_moment(MomentSum.zeros(6, device=device), keys[:40].to(device))
        accumulate_moment(total, keys.to(device), mask=mask.to(device))
        accumulate_moment(total, keys[:40].to(device))
        for read in (MomentSum.settle, MomentSum.second_moment, MomentSum.to_tensors, MomentSum.count.fget):
            with pytest.raises(NonFiniteError, match=f"row {row}; fix them"):
                read(total)


def test_wide_keys_and_none_are_served_too(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float64):
        keys = random_keys(9, 5, dtype)
        total = accumulate_moment(MomentSum.zeros(5, device=device), keys.to(device))
        assert_is_moment(total, torch.zeros(5, 5, dtype=torch.float64), keys)
    assert accumulate_moment(MomentSum.zeros(5, device=device), keys[:0].bfloat16().to(device)).count == 0
