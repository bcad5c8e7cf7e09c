"""Solves with a second moment: C⁻¹k from one factorisation, to a residual that is measured and reported.

Every closed-form editor asks for C⁻¹k (ROME's direction, MEMIT's and EMMET's gram matrices), and whitened similarity
is aᵀC⁻¹b. C is factored once per layer, in float32 where it is wide; float64 residuals bring each solution to the
wanted accuracy, and conjugate gradients preconditioned by the factor take over where plain refinement stalls (condition
≥ 1e7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from rep_fast.errors import CorruptFileError, HparamError, NonFiniteError, SingularMomentError, SolverError
from rep_fast.ops.arriving import read_late
from rep_fast.ops.cholesky import Factor, factorise
from rep_fast.ops.finite import is_finite
from rep_fast.ops.spd_residual import spd_residual
from rep_fast.ops.symmetric import symmetric
from rep_fast.tensor_files import load_tensors, save_tensors

PRECISIONS = ("auto", "fp32", "fp64")
_KIND = "spd_solver"
_FORMAT = 1
# up to this width "auto" takes float64 on a CPU: factor and first solve cost about the same (100 columns: 0.80 for 0.73
# s at M = 4096, 9 for 13 ms at 512), solves with the kept factor a third, and C has 64 MB at most
_WIDE_DIM = 4096
_MAX_REFINEMENTS = 20
_MAX_CG_STEPS = 400
# columns and steps of the power iteration that measures how fast refinement converges, and the trust it gets
_PROBES, _PROBE_STEPS, _PROBE_SAFETY = 8, 3, 2.0
# largest relative ridge that "auto" tries: beyond it the ridge would be a sizeable part of C itself
_AUTO_RIDGES = (0.0, *(10.0**exponent for exponent in range(-8, -1)))
_MORE_TOKENS = "collect more tokens (a longer text, or rep-fast moments --tokens N --out FILE for --moments FILE)"
# norms whose squares float32 adds without over- or underflow that counts
_SAFE_NORMS = (1e-10, 1e15)


@dataclass(frozen=True)
class SolverReport:
    """What was done: `precision` of the factor ("fp32", "fp64"), relative `ridge`, why the factor is wider than asked
    (`note`, else empty); of the latest solve: `method` ("none", "refinement", "conjugate gradients"), `iterations`
    and the achieved `residual`, worst column of ‖b − Cx‖₂/‖b‖₂; where the forward error ended the solve its estimate
    `forward_error`, and NaN for the residual, which is then not measured."""

    precision: str
    ridge: float
    note: str = ""
    method: str = "none"
    iterations: int = 0
    residual: float = 0.0
    forward_error: float | None = None


class SpdSolver:
    """A factored second moment. Build with `SpdSolver.factor` or `SpdSolver.load`.

    Attributes:
        second_moment: [M, M] as given (float32 stays float32), without the ridge; not copied, must not be changed.
        ridge: r; the systems solved are (C + r·tr(C)/M·I) x = b.
        tolerance: largest accepted residual.
        report: SolverReport with the latest solve.
    """

    def __init__(self, second_moment: Tensor, factor: Factor, *, shift: float, tolerance: float, report: SolverReport):
        self.second_moment = second_moment
        self.tolerance = tolerance
        self.report = report
        self._factor = factor
        self._shift = shift

    @classmethod
    def factor(
        cls,
        second_moment: Tensor,
        *,
        precision: str = "auto",
        ridge: float | str | None = None,
        tolerance: float = 1e-10,
        token_count: int | None = None,
    ) -> SpdSolver:
        """Cholesky factor of C + r·tr(C)/M·I (methods §4).

        Args:
            second_moment: C [M, M] symmetric float32 or float64, CPU or CUDA. Differences of rounding size between
                C_ij and C_ji are averaged away.
            precision: "fp32" factors in float32 and widens to float64 by itself where float32 fails although C is
                positive definite; "fp64" factors in float64 (forward errors near 1e-16·condition, twice the memory,
                mostly no refinement); "auto" is "fp64" up to M = 4096 on a CPU, else "fp32".
            ridge: r >= 0, None for 0, or "auto": the smallest of 0, 1e-8, 1e-7 … 1e-2 with which C factors.
            tolerance: largest accepted residual ‖b − Cx‖₂/‖b‖₂ of a solve, worst column.
            token_count: tokens behind C; fewer than M cannot give an invertible C and are refused without a ridge.
        Raises:
            HparamError: wrong shape, dtype, option or asymmetry.
            NonFiniteError: a NaN or infinity in C.
            SingularMomentError: C (with the ridge) is singular or indefinite.
        Cost: M³/6 multiply-adds; memory one factor beside C.
        """
        if precision not in PRECISIONS:
            raise HparamError(f"SpdSolver: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if not tolerance > 0:
            raise HparamError(f"SpdSolver: tolerance must be positive, got {tolerance}")
        matrix = symmetric(second_moment)
        M = matrix.shape[0]
        if precision == "auto":
            precision = "fp64" if M <= _WIDE_DIM and not matrix.is_cuda else "fp32"
        mean_diagonal = float(matrix.diagonal().double().mean())
        candidates = _AUTO_RIDGES if ridge == "auto" else (_fixed_ridge(ridge),)
        pivot = 0
        for r in candidates:
            if r == 0.0 and token_count is not None and token_count < M:
                pivot = token_count  # a sum of that many k kᵀ has no larger rank
                continue
            note = ""
            for attempt in dict.fromkeys((precision, "fp64")):
                factor, pivot = factorise(matrix, shift=r * mean_diagonal, precision=attempt)
                if factor is not None:
                    report = SolverReport(attempt, r, note)
                    return cls(matrix, factor, shift=r * mean_diagonal, tolerance=tolerance, report=report)
                note = f"float32 failed at pivot {pivot}; factored in float64"
        raise SingularMomentError(_singular(M, pivot, token_count, candidates[-1], ridge == "auto"))

    @property
    def key_dim(self) -> int:
        """M."""
        return self.second_moment.shape[0]

    @property
    def ridge(self) -> float:
        """r, relative to the mean diagonal entry of C."""
        return self.report.ridge

    def solve(
        self, right_hand_sides: Tensor, *, backward_error: float | None = None, forward_error: float | None = None
    ) -> Tensor:
        """X with (C + ridge) X = B, by the factor and float64 refinement.

        Args:
            right_hand_sides: B [M, n] float32 or float64 on C's device; n may be 0.
            backward_error: stop where ‖b − Cx‖₂ ≤ backward_error · (‖C‖‖x‖₂ + ‖b‖₂) in every column instead of at the
                solver's tolerance, which also bounds ‖b − Cx‖₂ / ‖b‖₂: at condition 1e6 that can take several times as
                many steps. 1e-13 is what a solver in float64 throughout gives. ‖C‖ is the Frobenius norm.
            forward_error: stop where ‖x − C⁻¹b‖₂ ≤ forward_error · ‖x‖₂ in every column, as the last correction and
                the rate at which corrections shrink tell (Demmel et al. 2006; the rate is measured once per factor).
                Saves the last residual. The estimate ends where the rounding of float64 residuals begins: errors below
                about condition · 2⁻⁵³ (1e-9 at condition 1e7) are neither reached nor seen. Where corrections shrink by
                less than a half, or stop before that, the tolerance decides instead and `report.forward_error` is
                None.
        Returns:
            [M, n] float64. `report` tells the iterations and the achieved residual.
        Raises:
            HparamError: shape, dtype or device do not fit.
            NonFiniteError: a NaN or infinity in B.
            SolverError: what was asked for is not reached.
        Cost: per step one float64 product with C and one pair of triangular solves.
        """
        goal = self._goal(backward_error, forward_error)
        b = self._checked_right_hand_sides(right_hand_sides)
        largest = b.abs().amax(dim=0)  # norms of tiny or huge columns would under- or overflow
        largest = torch.where(largest > 0, largest, 1.0)
        unit = b / largest
        lengths = unit.norm(dim=0)
        unit /= torch.where(lengths > 0, lengths, 1.0)
        if forward_error is not None:
            found = self._refine_to_error(unit, forward_error)
            if found is not None:
                return found * lengths * largest
        x, rest, iterations = self._refine(unit, goal)
        method = "refinement"
        if bool(goal.missed(rest, x) > 1.0):
            x, rest, cg_steps = self._conjugate_gradients(unit, x, rest, goal)
            method, iterations = "conjugate gradients", iterations + cg_steps
        worst = float(rest.norm(dim=0).max()) if rest.numel() else 0.0
        self.report = replace(self.report, method=method, iterations=iterations, residual=worst, forward_error=None)
        if not bool(goal.missed(rest, x) <= 1.0):
            raise SolverError(self._not_reached(x, worst, goal))
        return x * lengths * largest

    def solve_roughly(self, right_hand_sides: Tensor) -> Tensor:
        """C⁻¹B by the factor alone, [M, n] float64: no refinement, and no residual is measured.

        With a float32 factor the relative error is of the order of condition · 2⁻²⁴. Raises and arguments as `solve`.
        """
        return self._factor.solve(self._checked_right_hand_sides(right_hand_sides))

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """Whitened similarity AᵀC⁻¹B of the columns of A [M, a] and B [M, b]: [a, b] float64.

        Raises: as `solve`; the side with fewer columns is solved for.
        """
        first = self._checked_right_hand_sides(left)
        second = self._checked_right_hand_sides(right)
        if first.shape[1] < second.shape[1]:
            return self.solve(first).T @ second
        return first.T @ self.solve(second)

    def to_tensors(self) -> dict[str, Tensor]:
        """`second_moment` [M, M], `lower` [M, M] factor of the scaled matrix, `scale` [M] float64."""
        return {"second_moment": self.second_moment, "lower": self._factor.lower, "scale": self._factor.scale}

    def save(self, path: str | Path) -> None:
        """Write C and its factor as one safetensors file, atomically.

        Raises:
            OutputError: the file cannot be written.
        """
        facts = {
            "precision": self.report.precision,
            "ridge": self.report.ridge,
            "note": self.report.note,
            "shift": self._shift,
            "tolerance": self.tolerance,
        }
        save_tensors(path, self.to_tensors(), kind=_KIND, version=_FORMAT, description=facts)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None) -> SpdSolver:
        """Read what `save` wrote; solves are bitwise those of the saved solver.

        Raises:
            MissingFileError: there is no such file. CorruptFileError: damaged, or not a solver file.
        """
        facts, tensors = load_tensors(path, kind=_KIND, version=_FORMAT)
        try:
            matrix, lower, scale = (tensors[name].to(device) for name in ("second_moment", "lower", "scale"))
            report = SolverReport(facts["precision"], facts["ridge"], facts["note"])
            shift, tolerance = facts["shift"], facts["tolerance"]
        except KeyError as error:
            raise CorruptFileError(f"{path} lacks {error}; write it again") from error
        return cls(matrix, Factor(lower, scale), shift=shift, tolerance=tolerance, report=report)

    def _checked_right_hand_sides(self, b: Tensor) -> Tensor:
        if b.dim() != 2 or b.shape[0] != self.key_dim or b.dtype not in (torch.float32, torch.float64):
            raise HparamError(
                f"SpdSolver: right-hand sides must be ({self.key_dim}, n) float32|float64,"
                f" got {tuple(b.shape)} {b.dtype}"
            )
        if b.device != self.second_moment.device:
            raise HparamError(f"SpdSolver: right-hand sides are on {b.device}, C is on {self.second_moment.device}")
        if not is_finite(b):
            row = int((~torch.isfinite(b).all(dim=1)).nonzero()[0])
            raise NonFiniteError(f"SpdSolver: right-hand sides hold a NaN or infinity in row {row}")
        return b.detach().double()

    def _goal(self, backward_error: float | None, forward_error: float | None) -> _Goal:
        if backward_error is not None and forward_error is not None:
            raise HparamError("SpdSolver: backward_error and forward_error exclude each other; give one of them")
        if forward_error is not None and not forward_error > 0:
            raise HparamError(f"SpdSolver: forward_error must be positive, got {forward_error}")
        if backward_error is None:
            return _Goal(self.tolerance)
        if not backward_error > 0:
            raise HparamError(f"SpdSolver: backward_error must be positive, got {backward_error}")
        return _Goal(backward_error, self._moment_norm)

    @cached_property
    def _moment_norm(self) -> float:
        """‖C‖, Frobenius: rows in C's precision, which is ten times faster than widening, between them float64."""
        norm = float(torch.linalg.vector_norm(self.second_moment, dim=1).double().norm())
        if _SAFE_NORMS[0] <= norm <= _SAFE_NORMS[1]:
            return norm
        return float(torch.linalg.vector_norm(self.second_moment, dtype=torch.float64))

    @cached_property
    def _contraction(self) -> float:
        """By how much a step of refinement shrinks an error, at most: ‖v − (LLᵀ)⁻¹Cv‖ / ‖v‖ under power iteration.

        The first correction alone does not tell: x may hold little of the directions in which the factor errs.
        """
        worst = torch.finfo(self._factor.lower.dtype).eps  # right-hand sides are rounded to that, whatever C is
        for _, largest in read_late(islice(self._probes(), _PROBE_STEPS)):
            if largest <= worst:
                break
            worst = largest
        return worst

    def _probes(self) -> Iterator[tuple[None, Tensor]]:
        """By how much each step of the power iteration changes its longest column."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.key_dim, _PROBES, dtype=torch.float64, generator=generator).to(self.second_moment.device)
        nothing = torch.zeros_like(v)
        while True:
            v /= v.norm(dim=0)
            v = self._factor.solve(self._residual(nothing, v)).add_(v)
            yield None, v.norm(dim=0).max()

    def _residual(self, unit: Tensor, x: Tensor) -> Tensor:
        """b − (C + shift·I) x in float64."""
        return spd_residual(self.second_moment, self._shift, x, unit)

    def _refine(self, unit: Tensor, goal: _Goal) -> tuple[Tensor, Tensor, int]:
        """Iterative refinement to the goal or until a step gains less than a factor of two: x, rest, steps."""
        iterates = read_late(self._refinements(unit, goal), ends=partial(self._likely_reaches, goal))
        (x, rest), missed = next(iterates)
        for step in range(1, _MAX_REFINEMENTS + 1):
            if missed <= 1.0:
                return x, rest, step - 1
            (candidate, next_rest), next_missed = next(iterates)
            if not next_missed < missed:
                return x, rest, step
            stalls = next_missed > 0.5 * missed
            x, rest, missed = candidate, next_rest, next_missed
            if stalls:
                break
        return x, rest, step

    def _refinements(self, unit: Tensor, goal: _Goal) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Step by step x and its rest, and by how much they miss the goal."""
        x = self._factor.solve(unit)
        while True:
            rest = self._residual(unit, x)
            yield (x, rest), goal.missed(rest, x)
            x = self._factor.solve(rest).add_(x)

    def _likely_reaches(self, goal: _Goal, missed: Sequence[float]) -> bool:
        """Whether the step after those that missed the goal by so much should reach it.

        Right-hand sides have norm 1, so what n steps have left of it tells what one step leaves.
        """
        if not missed:
            return self.report.precision == "fp64"
        return missed[-1] * (missed[-1] * goal.tolerance) ** (1 / len(missed)) <= 1.0

    def _refine_to_error(self, unit: Tensor, forward_error: float) -> Tensor | None:
        """Iterative refinement until the estimated error of every column is small, None where it converges slowly."""
        rate = _PROBE_SAFETY * self._contraction
        if not rate <= 0.5:
            return None
        x, estimate, step = self._factor.solve(unit), rate, 0
        if estimate > forward_error:
            corrected = read_late(
                islice(self._corrections(unit, x, rate), _MAX_REFINEMENTS),
                ends=lambda known: rate * (known or [rate])[-1] <= forward_error,
            )
            for step, (x, estimate) in enumerate(corrected, 1):  # noqa: B007 - the last is the result
                if not estimate > forward_error:
                    break
            else:
                return None
        self.report = replace(
            self.report, method="refinement", iterations=step, residual=math.nan, forward_error=estimate
        )
        return x

    def _corrections(self, unit: Tensor, x: Tensor, rate: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Step by step x, and what the latest correction lets its relative error be."""
        while True:
            correction = self._factor.solve(self._residual(unit, x))
            x = x + correction
            shares = _ratio(correction.norm(dim=0), x.norm(dim=0))
            # the next correction would be `rate` times this one, all that follow 1 / (1 - rate) times that
            yield x, rate / (1 - rate) * (shares.max() if shares.numel() else shares.sum())

    def _conjugate_gradients(
        self, unit: Tensor, start: Tensor, rest: Tensor, goal: _Goal
    ) -> tuple[Tensor, Tensor, int]:
        """Flexible conjugate gradients on all columns at once: the best iterate of each column, its rest, steps.

        The preconditioner is rounded differently at every step, hence the Polak–Ribière form of β.
        """
        steps = read_late(islice(self._gradient_steps(unit, start, rest, goal), _MAX_CG_STEPS))
        for step, (best, missed) in enumerate(steps, 1):  # noqa: B007 - the last is the result
            if missed <= 0.5:
                break
        return best, self._residual(unit, best), step

    def _gradient_steps(
        self, unit: Tensor, start: Tensor, rest: Tensor, goal: _Goal
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Step by step the best iterate of each column, and by how much they miss the goal."""
        x, best = start.clone(), start.clone()
        best_rest, best_norms = rest, rest.norm(dim=0)
        z = self._factor.solve(rest)
        direction, rz = z, (rest * z).sum(0)
        nothing = torch.zeros_like(unit)
        for step in count(1):
            image = self._residual(nothing, direction).neg_()
            alpha = _ratio(rz, (direction * image).sum(0))
            x = x + alpha * direction
            # the true residual: the recurrence drifts away from it exactly where the system is hard
            new_rest = self._residual(unit, x) if step % 8 == 0 else rest - alpha * image
            norms = new_rest.norm(dim=0)
            better = norms < best_norms
            best, best_norms = torch.where(better, x, best), torch.where(better, norms, best_norms)
            best_rest = torch.where(better, new_rest, best_rest)
            yield best, goal.missed(best_rest, best)
            new_z = self._factor.solve(new_rest)
            beta = _ratio((new_z * (new_rest - rest)).sum(0), rz)
            direction = new_z + beta * direction
            rest, rz = new_rest, (new_rest * new_z).sum(0)

    def _not_reached(self, x: Tensor, worst: float, goal: _Goal) -> str:
        norm = float(torch.linalg.vector_norm(self.second_moment))
        size = float(x.norm(dim=0).max()) if x.numel() else 0.0
        floor = torch.finfo(torch.float64).eps * norm * size
        wanted = "backward error" if goal.moment_norm else "tolerance"
        return (
            f"solve reached the residual {worst:.1e}, above the {wanted} {goal.tolerance:.1e}"
            f" (float64 rounding alone allows about {floor:.0e} here);"
            f" {_MORE_TOKENS}, or in Python add ridge= or accept a larger {wanted.replace(' ', '_')}="
        )


@dataclass(frozen=True)
class _Goal:
    """What ends a solve: ‖rest‖ ≤ tolerance · (1 + moment_norm · ‖x‖) in every column, right-hand sides having norm 1
    (or 0). A moment norm of 0 asks for the residual alone."""

    tolerance: float
    moment_norm: float = 0.0

    def missed(self, rest: Tensor, x: Tensor) -> Tensor:
        """Largest ‖rest‖ as a multiple of what is allowed, []: reached at 1."""
        if not rest.numel():
            return rest.new_zeros(())
        allowed = self.tolerance * (1.0 + self.moment_norm * x.norm(dim=0)) if self.moment_norm else self.tolerance
        return (rest.norm(dim=0) / allowed).max()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 for columns that are done."""
    return torch.where(denominator != 0, numerator / torch.where(denominator != 0, denominator, 1.0), 0.0)


def _fixed_ridge(ridge: float | str | None) -> float:
    if ridge is None:
        return 0.0
    if isinstance(ridge, str) or not math.isfinite(ridge) or ridge < 0:
        raise HparamError(f"SpdSolver: ridge must be a number >= 0, 'auto' or None, got {ridge!r}")
    return float(ridge)


def _singular(M: int, pivot: int, token_count: int | None, ridge: float, auto: bool) -> str:
    tokens = "an unknown number of tokens" if token_count is None else f"{token_count} tokens"
    tried = f" even with ridge {ridge:g}" if ridge else ""
    remedy = f"{_MORE_TOKENS}, or in Python pass ridge= (ridge='auto' finds the smallest)"
    if auto:
        remedy = "check how C was made"
    return f"second moment of width {M} from {tokens} is singular or indefinite at pivot {pivot}{tried}; {remedy}"
