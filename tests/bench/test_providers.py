"""What the benchmarks run: ours is exact on small cases, peers compute the same thing, and both are told apart."""

from __future__ import annotations

import pytest
import torch

from rep_fast.bench import OPS, MomentCase, ScoreCase, SolveCase, measure
from rep_fast.bench.levels import timed_levels
from rep_fast.ops import native

TINY = {
    "accumulate_moment": (MomentCase("tiny", 70, 50),),
    "packed_scores": (ScoreCase("tiny", 5, 50, 60),),
    "spd_solver": (SolveCase("tiny", 60, False, n_columns=3), SolveCase("tiny-cached", 60, True, n_columns=3)),
}
# float32 without refinement, and bfloat16: not what was asked for
INEXACT = ("factor alone", "bfloat16", "float32 inverse", "float32 Cholesky", "potrs", "cholesky_solve")


@pytest.mark.parametrize("op", TINY)
def test_ours_are_exact_and_float32_peers_compute_the_same(op: str) -> None:
    for case in TINY[op]:
        inputs = OPS[op].Inputs.draw(case, seed=3)
        providers = OPS[op].providers(inputs)
        rows = measure(op, case.name, providers, operations=case.operations, is_exact=inputs.is_exact, rounds=2)
        assert {row.provider for row in rows if row.exact} == {
            provider.name for provider in providers if not any(part in provider.name for part in INEXACT)
        }
        assert any(provider.is_ours for provider in providers) == (native.find().module is not None)
        assert all(row.ratio_to_best_peer is not None for row in rows)


def test_cached_factors_are_there_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = OPS["spd_solver"].Inputs.draw(TINY["spd_solver"][1], seed=3)
    providers = OPS["spd_solver"].providers(inputs)
    monkeypatch.setattr("rep_fast.bench.spd_solver.SpdSolver.factor", None)
    for provider in providers:
        provider.run()


def test_rough_solutions_are_near() -> None:
    for case in TINY["spd_solver"]:
        inputs = OPS["spd_solver"].Inputs.draw(case, seed=1)
        exact = torch.linalg.solve(inputs.moment.double(), inputs.right)
        for provider in OPS["spd_solver"].providers(inputs):
            assert float((provider.run() - exact).norm() / exact.norm()) < 0.3


def test_the_moment_has_the_condition_of_its_case() -> None:
    moment = OPS["spd_solver"].Inputs.draw(SolveCase("small", 84, False, condition=1e4), seed=0).moment
    assert torch.equal(moment, moment.T)
    values = torch.linalg.eigvalsh(moment.double())
    assert float(values[-1] / values[0]) == pytest.approx(1e4, rel=0.05)


def test_only_levels_with_a_body_of_their_own_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "avx512_bf16" not in timed_levels("spd_solver")
    monkeypatch.setenv("REP_FAST_ISA", "portable")
    assert timed_levels("spd_solver") == ["portable"]
    monkeypatch.setattr(native, "find", lambda: native.Native(None, "the test hides it"))
    assert timed_levels("spd_solver") == []
