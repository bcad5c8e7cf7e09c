"""The tiled pass of the `zabs` score on a GPU."""

from __future__ import annotations

import pytest
import torch
from cuda_bodies import needs_gpu, serve_by_executor

from rep_fast.ops import packed_scores, profile

# (tokens, D_in, D_out): ones, primes, beside the tile of 128 columns and the 16 tokens of a stage
SHAPES = ((1, 1, 1), (2, 47, 49), (15, 127, 129), (17, 130, 3))


@pytest.fixture(params=["cuda", "cuda-on-cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where tensors lie that the CUDA body serves."""
    if request.param == "cuda":
        needs_gpu()
        return torch.device("cuda")
    serve_by_executor(monkeypatch, "packed_scores")
    return torch.device("cpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_against_float64(device: torch.device, shape: tuple[int, int, int]) -> None:
    """A float32 product of T terms and sums of 8 absolute values; the rows are padded."""
    T, P, Q = shape
    generator = torch.Generator().manual_seed(T)
    a, b = (torch.randn(T, width + 3, generator=generator)[:, 1 : 1 + width] for width in (P, Q))
    with profile() as calls:
        found = torch.ops.rep_fast.abs_product_sum(a.to(device), b.to(device)).cpu()
    assert calls[0].backend.startswith("cuda")
    want = (a.double().T @ b.double()).abs().sum(0)
    bound = (T + 10) * 2.0**-24 * (a.double().abs().T @ b.double().abs()).sum(0)
    assert bool(((found - want).abs() <= bound).all())
    turned = torch.ops.rep_fast.abs_product_sum(a.to(device).T.contiguous().T, b.to(device))
    assert torch.equal(turned.cpu(), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_those_of_the_float64_body(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(19, width, generator=generator).to(dtype) for width in (40, 65))
    found = packed_scores(x.to(device), g.to(device), score="zabs")
    want = packed_scores(x.double(), g.double(), score="zabs")
    torch.testing.assert_close(found.columns.cpu(), want.columns, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.rows.cpu(), want.rows, rtol=1e-5, atol=1e-6)
