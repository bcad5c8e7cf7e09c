"""What gpu_check.py runs under compute-sanitizer: every kernel on small shapes, results checked. A process of its own:
`python benchmarks/gpu_small.py STAGE`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import gpu_stages
import torch
from torch.nn.functional import linear

from rep_fast.bench.cases import ScanCase
from rep_fast.bench.whitened_topk import Inputs
from rep_fast.ops import MomentSum, SpdSolver, gated_adapter, whitened_topk


def small_moment(body: str = "mma", width: int = 72) -> None:
    """Keys with a token that does not count, beside float64."""
    keys = torch.randn(700, width, device=gpu_stages.DEVICE).bfloat16()
    keys[5, 3] = torch.nan
    found = gpu_stages.moment_by(
        body, MomentSum.zeros(width, device=gpu_stages.DEVICE), keys, nonfinite="exclude"
    ).lower
    wide = torch.cat([keys[:5], keys[6:]]).double()
    torch.testing.assert_close(found.tril(), (wide.T @ wide).tril(), rtol=1e-4, atol=1e-2)


def small_scores() -> None:
    """Sums of absolute products, beside float64."""
    a, b = torch.randn(33, 130, device=gpu_stages.DEVICE), torch.randn(33, 131, device=gpu_stages.DEVICE)
    want = (a.double().T @ b.double()).abs().sum(0)
    torch.testing.assert_close(torch.ops.rep_fast.abs_product_sum(a, b), want, rtol=1e-4, atol=1e-4)


def small_solve() -> None:
    """A solve with refinement, beside float64."""
    moment = gpu_stages.random_moment(130)
    b = torch.randn(130, 5, device=gpu_stages.DEVICE, dtype=torch.float64)
    torch.testing.assert_close(
        SpdSolver.factor(moment).solve(b), torch.linalg.solve(moment.double(), b), rtol=1e-6, atol=1e-8
    )


def small_gates() -> None:
    """Gates of a few and of many tokens, several adapters; every gate open once."""
    adapters = [gpu_stages.random_adapter(72, 20, torch.float32, seed) for seed in range(3)]
    for n_tokens in (1, 9, 70):
        keys = torch.randn(n_tokens, 72, device=gpu_stages.DEVICE)
        want = keys
        for own in adapters:
            want = want + linear(linear(want, own.a), own.b)
        torch.testing.assert_close(gated_adapter(keys, adapters, tau=0.0), want, rtol=1e-4, atol=1e-4)
        assert torch.equal(gated_adapter(keys, adapters, tau=0.999), keys)


def small() -> None:
    """Every kernel once on small shapes, for compute-sanitizer; results are checked."""
    inputs = Inputs.draw(ScanCase("small", n_keys=700, n_queries=9, key_dim=72, k=10), seed=0)
    device = torch.device(gpu_stages.DEVICE)
    keys, queries, rule = inputs.keys.to(device), inputs.queries.to(device), inputs.exclusion.to(device)
    for precision in ("int8", "bf16", "bf16x2", "fp32", "fp64"):
        found = whitened_topk(keys, queries, 10, exclusion=rule, precision=precision)
        assert inputs.is_exact(found.ids.cpu()), precision
    small_gates()
    small_moment()
    small_scores()
    small_solve()


def fused_small() -> None:
    """The fused scan once, for compute-sanitizer; more stages than its ring has."""
    if not gpu_stages.is_hopper():
        return
    inputs = Inputs.draw(ScanCase("small", n_keys=gpu_stages.SIZES.small_keys, n_queries=9, key_dim=712, k=10), seed=0)
    device = torch.device(gpu_stages.DEVICE)
    keys, queries, rule = inputs.keys.to(device), inputs.queries.to(device), inputs.exclusion.to(device)
    for precision in ("bf16", "bf16x2", "int8"):
        found = gpu_stages.scan_by("fused", keys, queries, 10, exclusion=rule, precision=precision)
        assert inputs.is_exact(found.ids.cpu()), precision


def wgmma_small() -> None:
    """The second moment by the bodies for Hopper, for compute-sanitizer; more stages than their rings have, and tiles
    on and below the diagonal."""
    if not gpu_stages.is_hopper():
        return
    for body in ("wgmma128", "wgmma192"):
        small_moment(body, width=400)


STAGES: dict[str, Callable[[], None]] = {"small": small, "fused_small": fused_small, "wgmma_small": wgmma_small}

if __name__ == "__main__":
    STAGES[sys.argv[1]]()
