"""The products behind SpdSolver: solves with a float32 factor, residuals in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rep_fast.ops import native, profile
from rep_fast.ops.cholesky import Factor, factorise
from rep_fast.ops.spd_residual import spd_residual

# (M, n): ones, primes, beside the block of 96 rows, the depth of 128, the 192 rows of a residual's task, and the tiles
# of 8 rows and 8, 16, 24 or 48 columns
SHAPES = ((1, 1), (7, 3), (95, 16), (97, 17), (127, 47), (129, 49), (191, 64), (193, 65), (389, 9))


def random_moment(M: int, *, seed: int = 0) -> Tensor:
    keys = torch.randn(2 * M + 3, M, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    moment = keys.T @ keys / len(keys)
    return ((moment + moment.T) / 2).float()


def random_columns(M: int, n: int, *, seed: int = 1) -> Tensor:
    return torch.randn(M, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factor_of(C: Tensor) -> Factor:
    factor, _ = factorise(C, shift=0.0, precision="fp32")
    assert factor is not None
    return factor


def solve_bound(lower: Tensor, x: Tensor) -> Tensor:
    """Bound of |L Lᵀ x − b| per entry: every product and sum of the two substitutions rounds once, γ = (M + 96)·2⁻²⁴
    in units of |L||Lᵀ||x|, and the inverse of a diagonal block brings its condition along."""
    size = lower.double().abs()
    blocks = [lower[i : i + 96, i : i + 96].double() for i in range(0, len(lower), 96)]
    condition = max(float(block.inverse().abs().matmul(block.abs()).sum(1).max()) for block in blocks)
    return 4 * condition * (len(lower) + 96) * 2.0**-24 * (size @ (size.T @ x.abs())) + 1e-30


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_solve_satisfies_the_system(level: str, shape: tuple[int, int]) -> None:
    factor = factor_of(random_moment(shape[0]))
    b = random_columns(*shape)
    lower, scale = factor.lower, factor.scale.unsqueeze(1)
    x = factor.solve(b) / scale
    rest = b * scale - lower.double() @ (lower.double().T @ x)
    # b becomes float32 once
    bound = solve_bound(lower, x) + 2.0**-24 * (b * scale).abs().amax(dim=0)
    assert bool((rest.abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_is_that_of_float64(level: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    C = random_moment(shape[0]).to(dtype)
    x, b = random_columns(*shape), random_columns(*shape, seed=2)
    found = spd_residual(C, 0.25, x, b)
    want = b - (C.double() @ x + 0.25 * x)
    scale = b.abs() + C.double().abs() @ x.abs() + 0.25 * x.abs()
    assert bool(((found - want).abs() <= 2 * (shape[0] + 4) * 2.0**-53 * scale).all())


def test_residual_widens_before_it_multiplies(level: str) -> None:
    """b − Cx cancels to its last digits: a float32 product anywhere would leave 1e-7."""
    C = random_moment(130)
    x = random_columns(130, 5)
    rest = spd_residual(C, 0.0, x, C.double() @ x)
    assert float(rest.abs().max()) <= 1e-13


def test_padded_rows_of_the_matrix(level: str) -> None:
    wide = torch.zeros(140, 150)
    wide[:, 3:143] = random_moment(140)
    x, b = random_columns(140, 3), random_columns(140, 3, seed=2)
    assert torch.equal(spd_residual(wide[:, 3:143], 0.0, x, b), spd_residual(random_moment(140), 0.0, x, b))
    transposed = random_moment(140).T
    torch.testing.assert_close(spd_residual(transposed, 0.0, x, b), spd_residual(wide[:, 3:143], 0.0, x, b))


def test_bits_do_not_depend_on_threads_or_on_the_other_columns(level: str, threads: None) -> None:
    if level in ("reference", "cuda-on-cpu"):
        pytest.skip("needs the native module: a library, which a GPU takes for many columns, promises no such thing")
    C = random_moment(250)
    factor = factor_of(C)
    x, b = random_columns(250, 70), random_columns(250, 70, seed=2)
    solved, rests = [], []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        solved.append(factor.solve(b))
        rests.append(spd_residual(C, 0.5, x, b))
    assert all(torch.equal(solved[0], other) for other in solved[1:])
    assert all(torch.equal(rests[0], other) for other in rests[1:])
    assert torch.equal(factor.solve(b[:, 60:63]), solved[0][:, 60:63])
    assert torch.equal(spd_residual(C, 0.5, x[:, 60:63], b[:, 60:63]), rests[0][:, 60:63])


@pytest.mark.parametrize("shape", [(1, 1), (97, 5), (193, 9)], ids=str)
def test_reads_nothing_beyond_the_tensors(
    level: str, shape: tuple[int, int], before_unreadable_page: Callable[[Tensor], Tensor]
) -> None:
    C = before_unreadable_page(random_moment(shape[0]))
    factor = factor_of(C)
    x, b = (before_unreadable_page(random_columns(*shape, seed=seed)) for seed in (1, 2))
    assert torch.isfinite(spd_residual(C, 0.0, x, b)).all()
    if factor.inverses is not None:
        parts = (before_unreadable_page(part) for part in (factor.lower, factor.inverses, factor.scale, b))
        assert torch.equal(torch.ops.rep_fast.cholesky_solve(*parts), factor.solve(b))


def test_entries_above_the_diagonal_are_not_read(level: str) -> None:
    factor = factor_of(random_moment(200))
    if factor.inverses is None:
        pytest.skip("needs the native module")
    dirty = factor.lower + torch.full((200, 200), torch.nan).triu(1)
    b = random_columns(200, 4)
    assert torch.equal(Factor(dirty, factor.scale).inverses, factor.inverses)
    assert torch.equal(Factor(dirty, factor.scale).solve(b), factor.solve(b))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), M=st.integers(1, 40), n=st.integers(0, 5), exponent=st.integers(-60, 60))
def test_solve_is_free_of_scale(seed: int, M: int, n: int, exponent: int) -> None:
    """Powers of two in C and B come out exactly, whatever float32 could hold of them."""
    C, b = random_moment(M, seed=seed), random_columns(M, n, seed=seed)
    plain = factor_of(C).solve(b)
    scaled = factor_of(C.double() * 4.0**exponent).solve(b * 2.0**-exponent)
    assert torch.equal(scaled, plain * 2.0 ** (-3 * exponent))


def test_profile_tells_the_work() -> None:
    if native.find().module is None:
        pytest.skip("needs the native module")
    factor = factor_of(random_moment(50))
    with profile() as calls:
        factor.solve(random_columns(50, 3))
    assert [(call.op, call.flops) for call in calls] == [("spd_solver", 2 * 50 * 50 * 3)]


def test_opcheck() -> None:
    C = random_moment(20)
    factor = factor_of(C)
    inverses = factor.inverses if factor.inverses is not None else torch.zeros(20, 96)
    parts = (factor.lower, inverses, factor.scale, random_columns(20, 3))
    torch.library.opcheck(torch.ops.rep_fast.cholesky_solve.default, parts)
    torch.library.opcheck(
        torch.ops.rep_fast.spd_residual.default, (C, 0.5, random_columns(20, 3), random_columns(20, 3))
    )


def test_errors() -> None:
    C = random_moment(6)
    with pytest.raises(ValueError, match=r"x and b must be \(6, n\) float64"):
        spd_residual(C, 0.0, random_columns(6, 2).float(), random_columns(6, 2))
    scale = torch.ones(6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"lower must be float32 and b float64, got torch.float32 and torch.float32"):
        torch.ops.rep_fast.cholesky_solve(C, C, scale, random_columns(6, 2).float())
    with pytest.raises(ValueError, match=r"b must be \(6, n\), got torch.Size\(\[5, 2\]\)"):
        torch.ops.rep_fast.cholesky_solve(C, C, scale, random_columns(5, 2))
