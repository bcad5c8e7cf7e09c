"""C⁻¹B beside what one would write without SpdSolver: an inverse, LU and Cholesky in torch and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from scipy.linalg import lapack
from torch import Tensor

from rep_fast.bench.cases import SOLVE_CASES, SolveCase
from rep_fast.bench.interleaved import Provider
from rep_fast.bench.levels import timed_levels
from rep_fast.ops import SpdSolver

CASES = SOLVE_CASES
_BACKWARD_ERROR = 1e-13
_SLAB = 512  # columns mixed at a time


@dataclass(frozen=True)
class Inputs:
    """C [M, M] float32 of the wanted condition, B [M, n] float64."""

    case: SolveCase
    moment: Tensor
    right: Tensor

    @classmethod
    def draw(cls, case: SolveCase, *, seed: int) -> Inputs:
        """Eigenvalues from 1 down to 1 / condition in equal ratios, eigenvectors mixed at random."""
        generator = torch.Generator().manual_seed(seed)
        moment = torch.diag(torch.logspace(0, -math.log10(case.condition), case.key_dim))
        for _ in range(2):  # Q D, then Q (Q D)ᵀ
            moment = moment.T.contiguous()
            _mix(moment, torch.Generator().manual_seed(seed))
        right = torch.randn(case.key_dim, case.n_columns, dtype=torch.float64, generator=generator)
        return cls(case, _symmetric(moment), right)

    @cached_property
    def float32_solver(self) -> SpdSolver:
        """The float32 factor of cached cases."""
        return SpdSolver.factor(self.moment, precision="fp32")

    @cached_property
    def solver(self) -> SpdSolver:
        """The factor that "auto" takes."""
        solver = SpdSolver.factor(self.moment)
        return self.float32_solver if solver.report.precision == "fp32" else solver

    def is_exact(self, x: Tensor) -> bool:
        """Whether ‖Cx − b‖ ≤ 1e-13 · (‖C‖‖x‖ + ‖b‖) in every column, all in float64."""
        wide = x.double()
        products = torch.cat([rows.double() @ wide for rows in self.moment.split(_SLAB)])
        norm = float(torch.linalg.vector_norm(self.moment, dtype=torch.float64))
        size = norm * wide.norm(dim=0) + self.right.norm(dim=0)
        return bool(((products - self.right).norm(dim=0) <= 1.01 * _BACKWARD_ERROR * size).all())


def _mix(columns: Tensor, generator: torch.Generator) -> None:
    """columns [M, n] times a random orthogonal (a·b)² matrix, the Kronecker product of two small ones, in place."""
    M = len(columns)
    a = next(size for size in range(math.isqrt(M), 0, -1) if M % size == 0)
    first, second = (torch.linalg.qr(torch.randn(size, size, generator=generator)).Q for size in (a, M // a))
    for slab in columns.split(_SLAB, dim=1):
        mixed = torch.matmul(second, slab.reshape(a, M // a, -1))
        slab.copy_((first @ mixed.reshape(a, -1)).reshape(M, -1))


def _symmetric(matrix: Tensor) -> Tensor:
    """The mean of a matrix and its transpose, exactly symmetric, in place."""
    for begin in range(0, len(matrix), _SLAB):
        rows = matrix[begin : begin + _SLAB, : begin + _SLAB]
        mirrored = matrix[: begin + _SLAB, begin : begin + _SLAB]
        mean = (rows + mirrored.T) / 2
        rows.copy_(mean)
        mirrored.copy_(mean.T)
    return matrix


def providers(inputs: Inputs) -> list[Provider]:
    """Ours with a float32 factor at every level: refined, with a cached one also by the factor alone; what "auto"
    takes; then the peers."""
    ours = []
    for name in timed_levels("spd_solver"):
        if inputs.case.is_cached:
            ours.append(Provider(f"rep_fast {name} factor alone", "fp32", _roughly(inputs), True, name))
            ours.append(Provider(f"rep_fast {name} refined", "fp32", _refined(inputs), True, name))
        else:
            refined = partial(_factor_and_solve, inputs, "fp32")
            ours.append(Provider(f"rep_fast {name} refined", "fp32", refined, True, name))
    if ours:
        if inputs.case.is_cached:
            _ = inputs.solver, inputs.float32_solver  # made now: the memory of the first run is not the factor's
        solve = _solved(inputs) if inputs.case.is_cached else partial(_factor_and_solve, inputs, "auto")
        ours.append(Provider("rep_fast auto", "fp32", solve, True))
    return [*ours, *(_cached_peers(inputs) if inputs.case.is_cached else _peers(inputs))]


def _roughly(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: inputs.float32_solver.solve_roughly(inputs.right)


def _refined(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: inputs.float32_solver.solve(inputs.right, backward_error=_BACKWARD_ERROR)


def _solved(inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: inputs.solver.solve(inputs.right, backward_error=_BACKWARD_ERROR)


def _factor_and_solve(inputs: Inputs, precision: str) -> Tensor:
    return SpdSolver.factor(inputs.moment, precision=precision).solve(inputs.right, backward_error=_BACKWARD_ERROR)


def _peers(inputs: Inputs) -> list[Provider]:
    right = inputs.right
    return [
        Provider("torch float32 inverse", "fp32", lambda: torch.linalg.inv(inputs.moment) @ right.float()),
        Provider("torch float64 LU", "fp32", lambda: torch.linalg.solve(inputs.moment.double(), right)),
        Provider("scipy float32 Cholesky", "fp32", partial(_lapack, inputs, torch.float32)),
        Provider("scipy float64 Cholesky", "fp32", partial(_lapack, inputs, torch.float64)),
    ]


def _lapack(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    is_wide = dtype == torch.float64
    factorise, solve = (lapack.dpotrf, lapack.dpotrs) if is_wide else (lapack.spotrf, lapack.spotrs)
    copy = inputs.moment.to(dtype, copy=True).numpy()
    factor, _ = factorise(copy.T, lower=0, clean=0, overwrite_a=1)
    return torch.from_numpy(solve(factor, inputs.right.to(dtype).numpy(), lower=0)[0])


def _cached_peers(inputs: Inputs) -> list[Provider]:
    factor, _ = lapack.spotrf(inputs.moment.numpy().T, lower=0, clean=1)
    right = inputs.right.float()
    return [
        Provider("scipy float32 potrs", "fp32", lambda: torch.from_numpy(lapack.spotrs(factor, right.numpy())[0])),
        Provider(
            "torch float32 cholesky_solve", "fp32", lambda: torch.cholesky_solve(right, torch.from_numpy(factor.T))
        ),
    ]
