"""Identities of the batch closed forms on random matrices (methods §15), float64, no model.

Every form is compared with the papers' M×M system, written down as it stands in methods §5.3 to §5.7.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rep_fast.editors.least_squares import solve_batch, spread_share
from rep_fast.errors import SolverError
from rep_fast.ops import SpdSolver

D, M, N, PAST = 12, 40, 7, 5
LAMBDA = 9.0


class Problem:
    """Keys and residuals of a batch, past keys, and a second moment with four small eigenvalues in ten."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis = torch.linalg.qr(normal(M, M)).Q
        spectrum = torch.cat([torch.full((M * 2 // 5,), 0.003), torch.linspace(0.5, 3, M - M * 2 // 5)]).double()
        self.second_moment = (basis * spectrum) @ basis.T
        self.second_moment = (self.second_moment + self.second_moment.T) / 2
        null = basis[:, : M * 2 // 5]
        self.projector = null @ null.T
        self.keys, self.residuals, self.past = normal(M, N), normal(D, N), normal(M, PAST)
        self.weight, self.probes = normal(D, M), normal(M, 20)
        solver = SpdSolver.factor(self.second_moment, precision="fp64", tolerance=1e-13)
        self.whiten = solver.solve
        self.project = lambda columns: self.projector @ columns

    def memit(self, ridge: float, *, columns: int = N, past: Tensor | None = None) -> Tensor:
        keys, residuals = self.keys[:, :columns], self.residuals[:, :columns]
        return solve_batch(keys, residuals, metric=self.whiten, ridge=ridge, past=past).delta().to_dense()


@pytest.fixture(params=range(3))
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def assert_equal(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    assert float((found - wanted).norm() / wanted.norm()) <= tolerance


def dense(normal: Tensor, right: Tensor) -> Tensor:
    """ΔW with ΔW · normal = right, by the M×M solve."""
    return torch.linalg.solve(normal.T, right.T).T


@pytest.mark.parametrize("columns", [1, 2, N])
def test_memit_solves_its_normal_equations(problem: Problem, columns: int) -> None:
    """T-memit-normal and T-memit-woodbury: the n×n form is the M×M one, and meets ΔW(λC + KKᵀ) = RKᵀ."""
    K, R = problem.keys[:, :columns], problem.residuals[:, :columns]
    normal = LAMBDA * problem.second_moment + K @ K.T
    delta = problem.memit(LAMBDA, columns=columns)
    assert_equal(delta @ normal, R @ K.T)
    assert_equal(delta, dense(normal, R @ K.T))


def test_memit_writes_the_fraction_beta_over_beta_plus_lambda(problem: Problem) -> None:
    """T-memit-frac."""
    k, r = problem.keys[:, 0], problem.residuals[:, 0]
    beta = float(k @ problem.whiten(k[:, None])[:, 0])
    assert_equal(problem.memit(LAMBDA, columns=1) @ k, r * beta / (beta + LAMBDA))


def test_emmet_meets_its_constraints_exactly(problem: Problem) -> None:
    """T-emmet: W'K = WK + R at λ_e = 0, with the smallest tr(ΔW C ΔWᵀ) of all updates that do."""
    delta, C = problem.memit(0.0), problem.second_moment
    W, K, R = problem.weight, problem.keys, problem.residuals
    assert_equal((W + delta) @ K, W @ K + R)
    free = problem.probes[:D, :1] @ problem.probes[:, 1:2].T
    feasible = delta + free - free @ K @ torch.linalg.solve(K.T @ K, K.T)
    assert_equal(feasible @ K, R)
    assert torch.trace(delta @ C @ delta.T) <= torch.trace(feasible @ C @ feasible.T)


@pytest.mark.parametrize("columns", [1, N])
@pytest.mark.parametrize(("alpha", "lambda_e"), [(1.0, 0.1), (1000.0, 0.1), (0.25, 4.0)])
def test_emmet_is_memit_with_the_product_of_its_weights(
    problem: Problem, columns: int, alpha: float, lambda_e: float
) -> None:
    """T-emmet-memit: R (Kᵀ(αC)⁻¹K + λ_e I)⁻¹ Kᵀ(αC)⁻¹ is MEMIT at λ = α λ_e, and so are the M×M equations."""
    K, R, scaled = problem.keys[:, :columns], problem.residuals[:, :columns], alpha * problem.second_moment
    images = torch.linalg.solve(scaled, K)
    emmet = R @ torch.linalg.solve(K.T @ images + lambda_e * torch.eye(columns).double(), images.T)
    assert_equal(problem.memit(alpha * lambda_e, columns=columns), emmet)
    assert_equal(emmet, dense(alpha * lambda_e * problem.second_moment + K @ K.T, R @ K.T))


def test_memit_tends_to_the_equality_constrained_update(problem: Problem) -> None:
    """T-memit-limit."""
    assert_equal(problem.memit(1e-10), problem.memit(0.0), 1e-6)


def test_past_keys_enter_as_columns_without_residual(problem: Problem) -> None:
    """§5.7: ΔW = RKᵀ(λC + S + KKᵀ)⁻¹ with S = K_past K_pastᵀ."""
    K, R, S = problem.keys, problem.residuals, problem.past @ problem.past.T
    delta = problem.memit(LAMBDA, past=problem.past)
    assert_equal(delta, dense(LAMBDA * problem.second_moment + S + K @ K.T, R @ K.T))
    assert float((delta @ problem.past).norm()) < float((problem.memit(LAMBDA) @ problem.past).norm())
    assert float((problem.memit(0.0, past=problem.past) @ problem.past).norm()) <= 1e-9


@pytest.mark.parametrize("has_past", [False, True])
@pytest.mark.parametrize("l2", [10.0, 1.0, 0.01])
def test_alphaedit_solves_its_own_equations(problem: Problem, l2: float, has_past: bool) -> None:
    """T-alpha-woodbury: ΔWᵀ = (P(KKᵀ + S) + L2·I)⁻¹ PKRᵀ, with and without past keys."""
    K, R, P = problem.keys, problem.residuals, problem.projector
    past = problem.past if has_past else None
    S = problem.past @ problem.past.T if has_past else torch.zeros(M, M, dtype=torch.float64)
    found = solve_batch(K, R, metric=problem.project, ridge=l2, past=past).delta().to_dense()
    system = P @ (K @ K.T + S) + l2 * torch.eye(M, dtype=torch.float64)
    assert_equal(found, torch.linalg.solve(system, P @ K @ R.T).T)


def test_alphaedit_leaves_the_row_space_of_the_corpus_alone(problem: Problem) -> None:
    """T-alpha-null: ΔW P = ΔW, and ΔW k = 0 for every k with Pk = 0."""
    P = problem.projector
    found = solve_batch(problem.keys, problem.residuals, metric=problem.project, ridge=0.5, past=problem.past)
    delta = found.delta().to_dense()
    assert_equal(delta @ P, delta)
    outside = problem.probes - P @ problem.probes
    assert float((delta @ outside).norm()) <= 1e-12 * float(delta.norm() * outside.norm())


def test_the_images_are_those_of_the_batch(problem: Problem) -> None:
    found = solve_batch(problem.keys, problem.residuals, metric=problem.whiten, ridge=LAMBDA, past=problem.past)
    assert_equal(found.images, torch.linalg.solve(problem.second_moment, problem.keys))
    assert found.delta().rank == N


@pytest.mark.parametrize(
    ("root", "wanted"), [(False, [0.2] * 5), (True, [0.447, 0.276, 0.160, 0.083, 0.034])], ids=["memit", "pmet"]
)
def test_shares_of_perfect_writes(root: bool, wanted: list[float]) -> None:
    """T-spread."""
    left, shares = 1.0, []
    for step in range(5):
        shares.append(left * spread_share(step, 5, root=root))
        left -= shares[-1]
    assert shares == pytest.approx(wanted, abs=5e-4)
    assert sum(shares) == pytest.approx(1)


def test_dependent_keys_need_a_ridge(problem: Problem) -> None:
    twice = torch.cat([problem.keys, problem.keys[:, :1]], dim=1)
    residuals = problem.residuals[:, [*range(N), 0]]
    with pytest.raises(
        SolverError,
        match=r"8 keys to write and 0 past ones depend linearly .* ridge of 0; give the method a larger one",
    ):
        solve_batch(twice, residuals, metric=problem.whiten, ridge=0.0)
    solve_batch(twice, residuals, metric=problem.whiten, ridge=0.1)
