"""One layer's update for a batch of 100 edits: the n×n forms against the papers' M×M systems.

    python benchmarks/bench_batch_solve.py --width 4096 --rounds 5

Providers `rep_fast` (`editors/least_squares.py`, the factor of C or the basis of its null space made beforehand, once
per model) and `dense` (float64 systems of methods §5.3 and §5.6, solved as the references do) run in turn on the same
keys; ΔW is compared before anything is timed. `--past` adds that many keys of earlier edits. `--precision fp64` keeps a
float64 factor of C, which needs no refinement and twice the memory; editors keep float32 ones. Keys and C are
synthetic, with the structure real ones have: scales over one and a half decades, directions that many keys share.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rep_fast.editors.corpus_moments import WHITENING_ERROR
from rep_fast.editors.least_squares import solve_batch
from rep_fast.ops import SpdSolver
from rep_fast.stats.null_space import NullSpace

D, N_EDITS, LAMBDA_PER_WIDTH, L2 = 1024, 100, 1.4, 10.0
SHARED_DIRECTIONS, TILE = 256, 2048
SAME_UPDATE = 1e-8


@dataclass(frozen=True)
class Problem:
    """Keys [M, n], past keys [M, p], residuals [D, n], C [M, M] float32, and a projector's basis [M, M/2] float32."""

    keys: Tensor
    past: Tensor | None
    residuals: Tensor
    second_moment: Tensor
    basis: Tensor

    @classmethod
    def random(cls, width: int, n_past: int) -> Problem:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        # k = s ∘ (ε + Bη): every neuron its own scale, B what they share; C = E[k kᵀ] is known exactly
        scales = 10 ** (torch.rand(width, generator=generator) * 1.5 - 1)
        shared = normal(width, SHARED_DIRECTIONS) * torch.logspace(0, -1, SHARED_DIRECTIONS) / SHARED_DIRECTIONS**0.5
        moment = torch.empty(width, width)
        for first in range(0, width, TILE):  # tile by tile: a product of its own would hold the matrix twice
            rows = slice(first, first + TILE)
            torch.mm(shared[rows], shared.T, out=moment[rows])
            moment[rows].mul_(scales[rows, None]).mul_(scales)
        moment.diagonal().add_(scales.square())
        for first in range(0, width, TILE):
            corner = moment[first : first + TILE, first : first + TILE]
            corner.copy_(corner.triu() + corner.triu(1).T)
            moment[first + TILE :, first : first + TILE] = moment[first : first + TILE, first + TILE :].T

        def keys(count: int) -> Tensor:
            return (scales[:, None] * (normal(width, count) + shared @ normal(SHARED_DIRECTIONS, count))).double()

        return cls(
            keys(N_EDITS), keys(n_past) if n_past else None, normal(D, N_EDITS).double(), moment,
            torch.linalg.qr(normal(width, width // 2)).Q,
        )  # fmt: skip

    @property
    def gram_of_past(self) -> Tensor | float:
        """S = K_past K_pastᵀ, 0 without past keys."""
        return 0.0 if self.past is None else self.past @ self.past.T


def providers(problem: Problem, method: str, precision: str) -> dict[str, Callable[[], Tensor]]:
    """Both ways to ΔW [D, M]; what is made once per model is made here."""
    width, keys, residuals = len(problem.keys), problem.keys, problem.residuals
    if method == "memit":
        weight = LAMBDA_PER_WIDTH * width
        solver = SpdSolver.factor(problem.second_moment, precision=precision)
        whiten = partial(solver.solve, forward_error=WHITENING_ERROR)  # as the editors do
        moment, past = problem.second_moment.double(), problem.gram_of_past

        def ours() -> Tensor:
            update = solve_batch(keys, residuals, metric=whiten, ridge=weight, past=problem.past)
            return update.delta().to_dense()

        def dense() -> Tensor:
            system = weight * moment + past + keys @ keys.T
            return residuals @ torch.linalg.solve(system, keys).T

        return {"rep_fast": ours, "dense": dense}
    space = NullSpace(problem.basis, is_complement=False, eigenvalue=0.0)
    wide = problem.basis.double()
    projector, past = wide @ wide.T, problem.gram_of_past

    def projected() -> Tensor:
        return solve_batch(keys, residuals, metric=space.project, ridge=L2, past=problem.past).delta().to_dense()

    def unsymmetric() -> Tensor:
        system = projector @ (keys @ keys.T + past)
        system.diagonal().add_(L2)
        return torch.linalg.solve(system, projector @ keys @ residuals.T).T

    return {"rep_fast": projected, "dense": unsymmetric}


def interleaved(width: int, method: str, n_past: int, rounds: int, precision: str) -> None:
    """A, B, A, B …: medians, and the median and spread of the pairwise ratios."""
    runs = providers(Problem.random(width, n_past), method, precision)
    one, other = (run() for run in runs.values())
    difference = float((one - other).norm() / other.norm())
    del one, other
    assert difference <= SAME_UPDATE, f"{method} at M = {width}: ΔW differs by {difference:.1e}"
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    ratios = sorted(dense / ours for ours, dense in zip(seconds["rep_fast"], seconds["dense"], strict=True))
    ours, dense = (statistics.median(seconds[provider]) for provider in runs)
    name = f"{method} ({precision} factor)" if method == "memit" else method
    print(
        f"{name} M = {width}, {N_EDITS} edits, {n_past} past keys: rep_fast {ours:.3f} s, dense {dense:.3f} s, "
        f"median ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f}–{ratios[-1]:.1f}), "
        f"ΔW differs by {difference:.1e}, {torch.get_num_threads()} thread(s)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--method", choices=["memit", "alphaedit"], action="append")
    parser.add_argument("--past", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "fp64"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for method in arguments.method or ("memit", "alphaedit"):
        interleaved(arguments.width, method, arguments.past, arguments.rounds, arguments.precision)


if __name__ == "__main__":
    main()
