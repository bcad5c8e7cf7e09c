"""The int8 pass of the collision scan: exact on whatever keys, for whatever draw of its dither."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rep_fast import backend
from rep_fast.ops import whitened_topk
from rep_fast.ops.topk_state import PASSES

needs_int8 = pytest.mark.skipif(
    backend()["whitened_topk"][0] != "native-avx512_bf16", reason="needs AVX-512 BF16 and VNNI"
)
N, S, M = 3000, 60, 160


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, M, generator=generator)


def outlier_columns(n: int, generator: torch.Generator) -> Tensor:
    values = normal(n, generator)
    values[:, 3::37] *= 1000
    return values


def ill_conditioned(n: int, generator: torch.Generator) -> Tensor:
    """Condition 1e8 of the second moment, in a basis that no balancing of columns sees."""
    basis = torch.linalg.qr(torch.randn(M, M, generator=torch.Generator().manual_seed(1))).Q
    return (normal(n, generator) * torch.logspace(0, -4, M)) @ basis


def constant_rows(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 1, generator=generator).expand(n, M).contiguous()


def subnormal(n: int, generator: torch.Generator) -> Tensor:
    return normal(n, generator) * 1e-39


def few_values(n: int, generator: torch.Generator) -> Tensor:
    """Many ties and zero rows, and entries half-way between two steps."""
    values = torch.randint(-1, 2, (n, M), generator=generator) * 0.5
    values[:, 0] = 127
    values[::9] = 0
    return values


KINDS = (normal, outlier_columns, ill_conditioned, constant_rows, subnormal, few_values)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_hit_is_lost(kind: Callable[[int, torch.Generator], Tensor], dtype: torch.dtype) -> None:
    """The dither is fresh in every run; that its bound fails has probability 1e-9."""
    seed = secrets.randbits(60)
    generator = torch.Generator().manual_seed(seed)
    keys = kind(N, generator).to(dtype)
    for queries in (normal(S, generator), kind(S, generator)):
        found = whitened_topk(keys, queries, 10, precision="int8", seed=secrets.randbits(63))
        exact = whitened_topk(keys, queries, 10, precision="fp64")
        assert torch.equal(found.ids, exact.ids), f"seed {seed}"
        assert torch.equal(found.exact_scores, exact.exact_scores)
        assert found.pass_counts[PASSES.index("int8")] == N


@needs_int8
def test_seed_threads_and_blocks_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = normal(N, generator).bfloat16(), normal(S, generator)
    before = torch.get_num_threads()
    results = []
    try:
        for seed, threads, block in ((0, 1, N), (0, 3, N), (0, 2, 700), (5, 1, N), (2**63 - 1, 1, 1)):
            torch.set_num_threads(threads)
            state = None
            for start in range(0, min(N, 40 * block), block):
                state = whitened_topk(
                    keys[start : start + block],
                    queries,
                    10,
                    precision="int8",
                    state=state,
                    first_id=start,
                    seed=seed,
                )
            results.append(state)
    finally:
        torch.set_num_threads(before)
    *whole, few = results
    assert all(torch.equal(whole[0].exact_scores, other.exact_scores) for other in whole)
    assert all(torch.equal(whole[0].ids, other.ids) for other in whole)
    assert torch.equal(few.ids, whitened_topk(keys[:40], queries, 10, precision="fp64").ids)


@needs_int8
@pytest.mark.parametrize("delta", [1e-300, 0.5])
def test_delta_moves_the_margin_alone(delta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = normal(N, generator), normal(S, generator)
    found = whitened_topk(keys, queries, 10, precision="int8", delta=delta)
    assert torch.equal(found.ids, whitened_topk(keys, queries, 10, precision="fp64").ids)


@needs_int8
def test_rows_beyond_float32_once_balanced_are_scored() -> None:
    """Columns of very unlike sizes are scaled before they are rounded, and what then overflows is scored in float64."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = normal(400, generator), normal(5, generator)
    keys[:, 1] *= 1e-20
    queries[:, 1] *= 1e20
    keys[77, 1] = 1e35
    queries[4, 0] = 3e38
    for dtype in (torch.bfloat16, torch.float32):
        found = whitened_topk(keys.to(dtype), queries, 3, precision="int8")
        exact = whitened_topk(keys.to(dtype), queries, 3, precision="fp64")
        assert torch.equal(found.ids, exact.ids)
        assert torch.equal(found.exact_scores, exact.exact_scores)


@needs_int8
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keys_that_are_no_numbers_are_found(bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = normal(50, generator), normal(3, generator)
    keys[[7, 31], [0, M - 1]] = bad
    found = whitened_topk(keys, queries, 50, precision="int8", nonfinite="exclude")
    assert found.n_nonfinite == 2
    assert sorted(set(range(50)) - set(found.ids[0].tolist())) == [7, 31]
