"""Few right-hand sides on a GPU: solves with the factor and float64 residuals by the kernels, many by the library."""

from __future__ import annotations

import pytest
import torch
from cuda_bodies import needs_gpu, serve_by_executor
from torch import Tensor

from rep_fast.ops import SpdSolver, profile
from rep_fast.ops.cholesky import FEW_COLUMNS
from rep_fast.ops.spd_residual import spd_residual


@pytest.fixture(params=["cuda", "cuda-on-cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where tensors lie that the CUDA body serves."""
    if request.param == "cuda":
        needs_gpu()
        return torch.device("cuda")
    for name in ("cholesky", "spd_residual"):
        serve_by_executor(monkeypatch, "spd_solver", name)
    return torch.device("cpu")


def second_moment(M: int) -> Tensor:
    keys = torch.randn(3 * M, M, dtype=torch.float64, generator=torch.Generator().manual_seed(M))
    return keys.T @ keys / len(keys)


@pytest.mark.parametrize("n_columns", [0, 1, 5, FEW_COLUMNS + 1])
@pytest.mark.parametrize("M", [1, 63, 65, 130])
def test_solves_against_float64(device: torch.device, M: int, n_columns: int) -> None:
    moment = second_moment(M)
    b = torch.randn(M, n_columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = torch.linalg.solve(moment.float().double(), b)
    solver = SpdSolver.factor(moment.float().to(device), precision="fp32")
    with profile() as calls:
        rough = solver.solve_roughly(b.to(device)).cpu()
    assert calls[0].backend.startswith("cuda")
    # a Cholesky solve's backward error is below 8·M·2⁻²⁴ (Higham 2002, §10.1), times the condition
    condition = float(torch.linalg.cond(moment))
    assert bool(((rough - want).norm(dim=0) <= 8 * M * 2.0**-24 * condition * want.norm(dim=0)).all())
    torch.testing.assert_close(solver.solve(b.to(device)).cpu(), want, rtol=1e-7, atol=1e-9)


def test_columns_do_not_touch_each_other(device: torch.device) -> None:
    solver = SpdSolver.factor(second_moment(70).float().to(device), precision="fp32")
    b = torch.randn(70, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    b[:, 3] *= 1e-30
    whole = solver.solve_roughly(b)
    assert torch.equal(solver.solve_roughly(b[:, 3:5]), whole[:, 3:5])
    assert torch.equal(solver.solve_roughly(b.T.contiguous().T), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_columns", [1, 7, FEW_COLUMNS + 1])
def test_residuals_in_float64(device: torch.device, n_columns: int, dtype: torch.dtype) -> None:
    matrix = second_moment(67).to(dtype)
    generator = torch.Generator().manual_seed(3)
    x, b = (torch.randn(67, n_columns, dtype=torch.float64, generator=generator) for _ in range(2))
    found = spd_residual(matrix.to(device), 0.25, x.to(device), b.to(device)).cpu()
    want = b - (matrix.double() @ x + 0.25 * x)
    bound = 72 * 2.0**-53 * (b.abs() + matrix.double().abs() @ x.abs() + 0.25 * x.abs())
    assert bool(((found - want).abs() <= 2 * bound).all())


def test_the_factor_of_a_gpu_is_row_major() -> None:
    needs_gpu()
    lower = SpdSolver.factor(second_moment(80).float().cuda(), precision="fp32").to_tensors()["lower"]
    assert lower.stride() == (80, 1)
    assert not lower.triu(1).any()
