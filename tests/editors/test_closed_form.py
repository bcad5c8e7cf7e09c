"""Identities of the rank-one closed form on random matrices (methods §15), float64, no model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rep_fast.editors import closed_form
from rep_fast.ops import SpdSolver

D, M, P = 12, 20, 7


class Problem:
    """A linear module, a second moment and the keys of one edit."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight, self.bias = normal(D, M), normal(D)
        corpus = normal(5 * M, M) @ torch.diag(torch.linspace(0.3, 3, M, dtype=torch.float64))
        self.second_moment = corpus.T @ corpus / len(corpus)
        self.keys, self.v_star = normal(1, M) + 0.3 * normal(P, M), normal(D)
        self.probes = normal(30, M)
        self.values = self.keys @ self.weight.T + self.bias
        self.normal = normal

    def update(self, choice: str, *, only_bare: bool = False) -> Tensor:
        keys, values = (self.keys[:1], self.values[:1]) if only_bare else (self.keys, self.values)
        averaged = keys[0] if choice == "prompt" else keys.mean(dim=0)
        solver = SpdSolver.factor(self.second_moment, precision="fp64")
        direction = solver.solve(averaged[:, None])[:, 0]
        found = closed_form(keys=keys, values=values, v_star=self.v_star, direction=direction, choice=choice)
        return found.delta().to_dense()


@pytest.fixture(params=range(3))
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-9


def test_rome_maps_the_prompt_key_to_v_star(problem: Problem) -> None:
    """T-rome: W'k_0 + b = v*, rank 1."""
    delta = problem.update("rome")
    assert_equal((problem.weight + delta) @ problem.keys[0] + problem.bias, problem.v_star)
    assert torch.linalg.matrix_rank(delta, rtol=1e-9) == 1


def test_rome_and_r_rome_agree_when_only_the_bare_template_is_used(problem: Problem) -> None:
    assert_equal(problem.update("rome", only_bare=True), problem.update("prefix", only_bare=True))
    assert_equal(problem.update("rome", only_bare=True), problem.update("prompt"))


def test_r_rome_maps_the_averaged_key_to_v_star(problem: Problem) -> None:
    """T-rrome: W'k̄ + b = v*, and not so for k_0."""
    delta = problem.update("prefix")
    assert_equal((problem.weight + delta) @ problem.keys.mean(dim=0) + problem.bias, problem.v_star)
    at_prompt = (problem.weight + delta) @ problem.keys[0] + problem.bias
    assert float((at_prompt - problem.v_star).norm()) > 1e-3


def test_denominator_only_divides_by_the_averaged_response(problem: Problem) -> None:
    u = torch.linalg.solve(problem.second_moment, problem.keys.mean(dim=0))
    wanted = torch.outer(problem.v_star - problem.values[0], u) / (problem.keys.mean(dim=0) @ u)
    assert_equal(problem.update("denominator_only"), wanted)


@pytest.mark.parametrize("choice", ["rome", "prefix"])
def test_transfer_law(problem: Problem, choice: str) -> None:
    """T-transfer: (W' − W)k = residual · β(k, k̄)/β(reference, k̄)."""
    k_mean = problem.keys.mean(dim=0)
    u = torch.linalg.solve(problem.second_moment, k_mean)
    reference = k_mean if choice == "prefix" else problem.keys[0]
    residual = problem.v_star - (problem.weight @ reference + problem.bias)
    wanted = torch.outer(problem.probes @ u / (reference @ u), residual)
    assert_equal(problem.probes @ problem.update(choice).T, wanted)


def test_no_feasible_update_disturbs_the_corpus_less(problem: Problem) -> None:
    """T-rome-opt: ΔW has the smallest tr(ΔW C ΔWᵀ) among all ΔW with the same ΔW k̄."""
    k, C = problem.keys.mean(dim=0), problem.second_moment

    def disturbance(delta: Tensor) -> float:
        return float(torch.trace(delta @ C @ delta.T))

    best = problem.update("prefix")
    for _ in range(20):
        free = problem.normal(D, M)
        feasible = best + free - torch.outer(free @ k, k) / (k @ k)
        assert_equal(feasible @ k, best @ k)
        assert disturbance(best) <= disturbance(feasible)
