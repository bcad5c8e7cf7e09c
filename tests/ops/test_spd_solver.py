from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rep_fast.errors import (
    CorruptFileError,
    HparamError,
    MissingFileError,
    NonFiniteError,
    OutputError,
    SingularMomentError,
    SolverError,
)
from rep_fast.ops import SpdSolver
from rep_fast.reference import spd_solver as reference
from rep_fast.tensor_files import save_tensors

# float32 factors, whatever "auto" would take for moments as small as these
factor_float32 = partial(SpdSolver.factor, precision="fp32")


def moment_of_condition(M: int, condition: float, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(M, M, dtype=torch.float64, generator=generator))
    spectrum = condition ** torch.linspace(0, -1, M, dtype=torch.float64)
    C = (Q * spectrum) @ Q.T
    return (C + C.T) / 2


def random_columns(M: int, n: int, *, seed: int = 1) -> Tensor:
    return torch.randn(M, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_a_worse_factor(C: Tensor, *, times: float, tolerance: float) -> SpdSolver:
    """Its factor is that of C + times·λ·I with the least eigenvalue λ: a step of refinement leaves times/(1 + times) of
    the worst error, however this machine's library rounds."""
    solver = factor_float32(C, tolerance=tolerance)
    shifted = C + times * torch.linalg.eigvalsh(C)[0] * torch.eye(len(C), dtype=C.dtype)
    solver._factor = factor_float32(shifted)._factor
    return solver


def residual(C: Tensor, x: Tensor, b: Tensor) -> float:
    return float(((b - C.double() @ x).norm(dim=0) / b.norm(dim=0)).max())


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("M", [1, 2, 17, 255, 513])
def test_residual_is_reached_and_reported(level: str, M: int, dtype: torch.dtype, precision: str) -> None:
    C = moment_of_condition(M, 1e4).to(dtype)
    solver = SpdSolver.factor(C, precision=precision)
    b = random_columns(M, 3)
    x = solver.solve(b)
    assert x.dtype == torch.float64
    assert solver.report.residual <= 1e-10
    assert residual(C, x, b) == pytest.approx(solver.report.residual, rel=0.5, abs=1e-11)
    assert solver.report.precision == precision
    # forward error <= condition times residual
    want = reference.solve(C, b)
    assert float((x - want).norm() / want.norm()) <= 2e4 * 1e-10


def test_narrow_moments_are_factored_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rep_fast.ops.spd_solver._WIDE_DIM", 12)
    for M, precision in ((12, "fp64"), (13, "fp32")):
        solver = SpdSolver.factor(moment_of_condition(M, 1e4))
        assert solver.report.precision == precision
        solver.solve(random_columns(M, 2))
        assert (solver.report.iterations == 0) == (precision == "fp64")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    M=st.integers(1, 24),
    log_condition=st.floats(0, 5),
    scale=st.sampled_from([1e-25, 1.0, 1e30]),
)
def test_solving_undoes_the_product(seed: int, M: int, log_condition: float, scale: float) -> None:
    C = moment_of_condition(M, 10.0**log_condition, seed=seed) * scale
    x = random_columns(M, 2, seed=seed)
    b = C @ x
    found = factor_float32(C).solve(b)
    # relative forward error <= condition times (residual + rounding of C x)
    assert float((found - x).norm() / x.norm()) <= 10.0**log_condition * (2e-10 + 1e-14) * 2


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_identities_hold_at_1e_9_on_float64_factors(precision: str) -> None:
    C = moment_of_condition(60, 1e3)
    solver = SpdSolver.factor(C, precision=precision, tolerance=1e-13)
    A, B = random_columns(60, 4, seed=2), random_columns(60, 2, seed=3)
    torch.testing.assert_close(solver.similarity(A, B), reference.similarity(C, A, B), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solver.similarity(A, B), solver.similarity(B, A).T, rtol=1e-9, atol=1e-9)


def test_conjugate_gradients_take_over_where_refinement_stalls() -> None:
    C = moment_of_condition(300, 1e5)
    solver = with_a_worse_factor(C, times=20, tolerance=3e-9)
    b = random_columns(300, 5)
    x = solver.solve(b)
    assert (solver.report.precision, solver.report.method) == ("fp32", "conjugate gradients")
    assert solver.report.iterations > 0
    assert residual(C, x, b) <= 3e-9


@pytest.mark.parametrize("condition", [10, 1e6, 3e7])
def test_backward_error_of_float64(level: str, condition: float) -> None:
    """‖Cx − b‖ ≤ 1e-13·(‖C‖‖x‖ + ‖b‖) with C and its factor in float32, in fewer steps than the residual takes."""
    C = moment_of_condition(300, condition).float()
    solver = factor_float32(C)
    b = 1e-30 * random_columns(300, 4)
    x = solver.solve(b, backward_error=1e-13)
    steps = solver.report.iterations
    size = C.double().norm() * x.norm(dim=0) + b.norm(dim=0)
    assert bool(((C.double() @ x - b).norm(dim=0) <= 1.01e-13 * size).all())
    assert solver.report.precision == "fp32"
    assert solver.report.residual == pytest.approx(residual(C, x, b), rel=0.1, abs=1e-13)
    if condition == 1e6:
        solver.solve(b)
        assert steps < solver.report.iterations


def test_a_backward_error_that_is_not_reached_is_refused() -> None:
    solver = factor_float32(moment_of_condition(50, 1e4))
    with pytest.raises(SolverError, match=r"above the backward error 1\.0e-20 .* accept a larger backward_error="):
        solver.solve(random_columns(50, 1), backward_error=1e-20)
    with pytest.raises(HparamError, match=r"backward_error must be positive, got 0\.0"):
        solver.solve(random_columns(50, 1), backward_error=0.0)


@pytest.mark.parametrize("wanted", [1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("condition", [3, 1e3, 1e5])
@pytest.mark.parametrize("is_smooth", [False, True], ids=["random", "smooth"])
def test_the_forward_error_asked_for_is_kept(level: str, condition: float, wanted: float, is_smooth: bool) -> None:
    """Also for right-hand sides whose first correction, tiny, says little about the later ones."""
    C = moment_of_condition(300, condition).float()
    C = (C + C.T) / 2
    b = random_columns(300, 5)
    if is_smooth:  # x has little of the directions where a float32 factor errs
        b = torch.linalg.matrix_power(C.double(), 3) @ b
    solver = factor_float32(C)
    x = solver.solve(b, forward_error=wanted)
    # rounding of the float64 residual: condition · 2⁻⁵³ per entry, in both answers
    want, rounding = reference.solve(C, b), 4 * condition * 300**0.5 * 2.0**-53
    assert float(((x - want).norm(dim=0) / want.norm(dim=0)).max()) <= wanted + rounding
    assert solver.report.precision == "fp32"
    assert solver.report.forward_error is not None
    assert solver.report.forward_error <= wanted
    assert math.isnan(solver.report.residual)
    solver.solve(b)
    assert solver.report.forward_error is None


def test_the_forward_error_takes_no_step_too_many() -> None:
    """A float64 factor needs none, a float32 one in a condition of 100 one step for 1e-9."""
    C, b = moment_of_condition(200, 100), random_columns(200, 3)
    steps = []
    for precision in ("fp64", "fp32"):
        solver = SpdSolver.factor(C, precision=precision)
        solver.solve(b, forward_error=1e-9)
        steps.append(solver.report.iterations)
    assert steps == [0, 1]


def test_where_refinement_is_slow_the_tolerance_decides() -> None:
    C = moment_of_condition(300, 1e5)
    solver = with_a_worse_factor(C, times=20, tolerance=3e-9)
    b = random_columns(300, 2)
    x = solver.solve(b, forward_error=1e-10)
    assert solver.report.method == "conjugate gradients"
    assert solver.report.forward_error is None
    assert residual(C, x, b) <= 3e-9


def test_errors_of_the_forward_error() -> None:
    solver = factor_float32(torch.eye(3))
    with pytest.raises(HparamError, match=r"forward_error must be positive, got 0\.0"):
        solver.solve(torch.ones(3, 1), forward_error=0.0)
    with pytest.raises(HparamError, match="exclude each other; give one of them"):
        solver.solve(torch.ones(3, 1), forward_error=1e-9, backward_error=1e-13)
    b = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(solver.solve(b, forward_error=1e-9), b, rtol=1e-9, atol=0)
    assert solver.solve(torch.ones(3, 0), forward_error=1e-9).shape == (3, 0)


@pytest.mark.parametrize("size", [1e-24, 1.0, 1e24])
def test_the_norm_of_a_moment_of_any_size(size: float) -> None:
    C = size * moment_of_condition(40, 10)
    solver = factor_float32(C.float())
    b = random_columns(40, 2)
    x = solver.solve(b, backward_error=1e-13)
    allowed = 1.01e-13 * (C.norm() * x.norm(dim=0) + b.norm(dim=0))
    assert bool(((C.float().double() @ x - b).norm(dim=0) <= allowed).all())


def test_the_factor_alone_gives_float32_accuracy(level: str) -> None:
    C = moment_of_condition(200, 100)
    b = random_columns(200, 3)
    found = factor_float32(C).solve_roughly(b)
    want = reference.solve(C, b)
    assert float((found - want).norm() / want.norm()) <= 100 * 200 * 2.0**-24
    with pytest.raises(NonFiniteError, match="row 0"):
        factor_float32(C).solve_roughly(b * float("inf"))


def test_a_residual_above_the_tolerance_is_never_returned() -> None:
    solver = factor_float32(moment_of_condition(100, 1e9), tolerance=1e-14)
    with pytest.raises(SolverError, match=r"above the tolerance 1\.0e-14 .* --tokens N .* in Python add ridge="):
        solver.solve(random_columns(100, 1))
    assert solver.report.residual > 1e-14


def test_float32_factor_that_fails_is_widened() -> None:
    C = moment_of_condition(80, 1e10)
    solver = factor_float32(C, tolerance=1e-5)
    assert solver.report.precision == "fp64"
    assert "float32 failed at pivot" in solver.report.note
    b = random_columns(80, 2)
    assert residual(C, solver.solve(b), b) <= 1e-5


def test_keys_of_very_different_sizes() -> None:
    """Outlier columns are scaled away exactly before the float32 factor."""
    sizes = torch.logspace(-8, 8, 40, dtype=torch.float64)
    C = moment_of_condition(40, 10) * sizes * sizes.unsqueeze(1)
    C = (C + C.T) / 2
    b = C @ random_columns(40, 2)
    solver = factor_float32(C)
    assert residual(C, solver.solve(b), b) <= 1e-10
    assert solver.report.precision == "fp32"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("n_tokens", [1, 20, 46, 47])
def test_rank_deficient_moments_are_refused(n_tokens: int, precision: str) -> None:
    keys = random_columns(n_tokens, 48)
    C = keys.T @ keys / n_tokens
    with pytest.raises(SingularMomentError, match="from an unknown number of tokens is singular") as seen:
        SpdSolver.factor(C, precision=precision)
    assert "--tokens" in str(seen.value)
    assert "in Python pass ridge=" in str(seen.value)
    with pytest.raises(SingularMomentError, match=f"from {n_tokens} tokens is singular or indefinite at pivot"):
        SpdSolver.factor(C, precision=precision, token_count=n_tokens)


def test_fewer_tokens_than_the_width_are_refused_even_when_rounding_hides_it() -> None:
    with pytest.raises(SingularMomentError, match="from 5 tokens"):
        factor_float32(torch.eye(6), token_count=5)


def test_duplicate_directions_zero_columns_and_indefinite_matrices_are_refused() -> None:
    keys = random_columns(200, 9)
    keys[:, 7] = keys[:, 2]
    with pytest.raises(SingularMomentError, match="pivot 7"):
        factor_float32(keys.T @ keys)
    keys[:, 7] = 0
    with pytest.raises(SingularMomentError, match="pivot 7"):
        factor_float32(keys.T @ keys)
    indefinite = torch.eye(4)
    indefinite[1, 0] = indefinite[0, 1] = 2.0
    with pytest.raises(SingularMomentError, match="pivot 1"):
        factor_float32(indefinite)
    with pytest.raises(SingularMomentError, match="check how C was made"):
        factor_float32(indefinite, ridge="auto")


def test_ridge_is_relative_to_the_mean_diagonal() -> None:
    C = moment_of_condition(30, 1e3)
    solver = factor_float32(C, ridge=0.01)
    shifted = C + 0.01 * C.trace() / 30 * torch.eye(30, dtype=torch.float64)
    b = random_columns(30, 2)
    assert residual(shifted, solver.solve(b), b) <= 2e-10
    assert solver.report.ridge == solver.ridge == 0.01


def test_auto_ridge_is_the_smallest_that_factors() -> None:
    assert factor_float32(moment_of_condition(20, 100), ridge="auto").ridge == 0.0
    keys = random_columns(10, 24)
    C = keys.T @ keys
    solver = factor_float32(C, ridge="auto", token_count=10)
    assert solver.ridge == 1e-8
    noisy = C + 1e-5 * C.trace() / 24 * torch.diag(torch.tensor([-1.0] + [0.0] * 23, dtype=torch.float64))
    solver = factor_float32(noisy, ridge="auto")
    assert solver.ridge in (1e-5, 1e-4)
    with pytest.raises(SingularMomentError):
        factor_float32(noisy, ridge=solver.ridge / 10)


def test_float32_moments_are_kept_in_float32_and_not_copied() -> None:
    C = moment_of_condition(16, 10).float()
    assert factor_float32(C).second_moment.data_ptr() == C.data_ptr()


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_kept_is_the_cholesky_factor(dtype: torch.dtype, precision: str) -> None:
    """Also above the diagonal, where LAPACK looks at nothing and leaves what was there."""
    C = moment_of_condition(101, 10).to(dtype)
    tensors = SpdSolver.factor(C, precision=precision).to_tensors()
    lower, scale = tensors["lower"], tensors["scale"]
    eps = 2.0**-24 if precision == "fp32" else 2.0**-53
    product = lower.double() @ lower.double().T
    assert torch.equal(lower, lower.tril())
    assert float((product - scale[:, None] * C.double() * scale).norm()) <= 101 * eps * float(product.norm())


def test_the_moment_is_left_as_it_was() -> None:
    C = moment_of_condition(16, 10)
    before = C.clone()
    factor_float32(C, ridge=0.5).solve(random_columns(16, 1))
    assert torch.equal(C, before)


def test_rounding_of_a_product_is_not_an_asymmetry() -> None:
    C = moment_of_condition(30, 10)
    noise = 1e-12 * random_columns(30, 30)
    b = random_columns(30, 1)
    found = factor_float32(C + noise).solve(b)
    assert residual((C + noise + (C + noise).T) / 2, found, b) <= 1e-10


@pytest.mark.parametrize("entry", [(599, 0), (0, 599), (513, 511), (255, 257), (3, 5)])
def test_one_entry_that_breaks_symmetry_is_found(entry: tuple[int, int]) -> None:
    C = torch.eye(600)
    C[entry] = 1e-3
    with pytest.raises(HparamError, match="not symmetric"):
        factor_float32(C)


def test_zero_and_missing_columns() -> None:
    solver = factor_float32(moment_of_condition(12, 100))
    b = random_columns(12, 3)
    b[:, 1] = 0
    x = solver.solve(b)
    assert not x[:, 1].any()
    assert solver.solve(b[:, :0]).shape == (12, 0)
    torch.testing.assert_close(solver.solve(b * 1e-200), x * 1e-200, rtol=1e-9, atol=0)


def test_saved_solver_gives_the_same_bits(tmp_path: Path) -> None:
    solver = factor_float32(moment_of_condition(33, 1e5).float(), ridge=1e-6)
    solver.save(tmp_path / "solver.safetensors")
    again = SpdSolver.load(tmp_path / "solver.safetensors")
    b = random_columns(33, 2)
    assert torch.equal(again.solve(b), solver.solve(b))
    assert again.second_moment.dtype == torch.float32
    assert (again.ridge, again.tolerance) == (1e-6, 1e-10)
    assert again.report == solver.report


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "solver.safetensors"
    factor_float32(moment_of_condition(8, 10)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(CorruptFileError, match="is damaged or no spd_solver file"):
        SpdSolver.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match="does not match its digest"):
        SpdSolver.load(path)
    with pytest.raises(MissingFileError, match="there is no spd_solver file"):
        SpdSolver.load(tmp_path / "absent")
    save_tensors(path, {"x": torch.zeros(1)}, kind="something else", version=1, description={})
    with pytest.raises(CorruptFileError, match="something else"):
        SpdSolver.load(path)
    save_tensors(path, {"x": torch.zeros(1)}, kind="spd_solver", version=1, description={})
    with pytest.raises(CorruptFileError, match="lacks 'second_moment'"):
        SpdSolver.load(path)


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another place"):
        factor_float32(torch.eye(2)).save(tmp_path / "file" / "solver.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("C", "options", "error", "message"),
    [
        (torch.ones(2, 3), {}, HparamError, r"must be \(M, M\) float32\|float64, got \(2, 3\)"),
        (torch.eye(2).bfloat16(), {}, HparamError, "bfloat16"),
        (torch.eye(0), {}, HparamError, r"got \(0, 0\)"),
        (torch.eye(3).triu() + torch.ones(3, 3).triu(), {}, HparamError, "not symmetric"),
        (torch.eye(3) * float("nan"), {}, NonFiniteError, "row 0"),
        (torch.eye(3), {"precision": "bf16"}, HparamError, "precision must be one of auto, fp32, fp64, got 'bf16'"),
        (torch.eye(3), {"ridge": -1.0}, HparamError, "ridge must be .* got -1.0"),
        (torch.eye(3), {"ridge": "some"}, HparamError, "got 'some'"),
        (torch.eye(3), {"tolerance": 0.0}, HparamError, "tolerance must be positive, got 0.0"),
    ],
)
def test_errors_of_factor(C: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        factor_float32(C, **options)


@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        (torch.ones(3), HparamError, r"must be \(3, n\) float32\|float64, got \(3,\)"),
        (torch.ones(4, 1), HparamError, r"got \(4, 1\)"),
        (torch.ones(3, 1).half(), HparamError, "float16"),
        (torch.tensor([[0.0], [float("inf")], [0.0]]), NonFiniteError, "row 1"),
    ],
)
def test_errors_of_solve(b: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        factor_float32(torch.eye(3)).solve(b)
