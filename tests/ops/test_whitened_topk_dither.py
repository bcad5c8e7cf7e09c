"""The int8 pass of the collision scan: exact on whatever keys, for whatever draw of its dither."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cuda_bodies import needs_gpu, serve_by_executor
from hostile_rows import KINDS, normal
from scan_checks import FORCED, has_dot_products, whitened_topk
from torch import Tensor

from rep_fast.ops import TopK
from rep_fast.ops.topk_state import PASSES


class Sizes(NamedTuple):
    n: int
    m: int
    width: int


@pytest.fixture(params=["cpu", "cuda", "cuda-on-cpu"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sizes:
    """Each body with an int8 pass in turn; sizes that it works on in a moment."""
    if request.param == "cuda":
        needs_gpu()
        monkeypatch.setitem(FORCED, "device", "cuda")
    elif request.param == "cuda-on-cpu":
        serve_by_executor(monkeypatch, "whitened_topk")
        return Sizes(120, 3, 45)
    elif not has_dot_products():
        pytest.skip("needs AVX-512 BF16 and VNNI")
    return Sizes(3000, 60, 160)


def assert_same_hits(found: TopK, wanted: TopK) -> None:
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.exact_scores, wanted.exact_scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_hit_is_lost(sizes: Sizes, kind: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """The dither is fresh in every run; that its bound fails has probability 1e-9."""
    seed = secrets.randbits(60)
    generator = torch.Generator().manual_seed(seed)
    keys = kind(sizes.n, sizes.width, generator).to(dtype)
    for of_queries in (normal, kind):
        queries = of_queries(sizes.m, sizes.width, generator)
        found = whitened_topk(keys, queries, 10, precision="int8", seed=secrets.randbits(63))
        exact = whitened_topk(keys, queries, 10, precision="fp64")
        assert torch.equal(found.ids, exact.ids), f"seed {seed}"
        assert torch.equal(found.exact_scores, exact.exact_scores)
        assert found.pass_counts[PASSES.index("int8")] == sizes.n


def test_seed_threads_and_blocks_do_not_matter(sizes: Sizes, threads: None) -> None:
    generator = torch.Generator().manual_seed(0)
    n = sizes.n
    keys, queries = normal(n, sizes.width, generator).bfloat16(), normal(sizes.m, sizes.width, generator)
    results = []
    for seed, n_threads, block in (
        (0, 1, n),
        (0, 3, n),
        (0, 2, n // 4 - 50 * (n > 1000)),
        (5, 1, n),
        (2**63 - 1, 1, 1),
    ):
        torch.set_num_threads(n_threads)
        state = None
        for start in range(0, min(n, 40 * block), block):
            state = whitened_topk(
                keys[start : start + block], queries, 10, precision="int8", state=state, first_id=start, seed=seed
            )
        assert state is not None
        results.append(state)
    *whole, few = results
    for other in whole:
        assert_same_hits(other, whole[0])
    assert_same_hits(few, whitened_topk(keys[:40], queries, 10, precision="fp64"))


@pytest.mark.parametrize("delta", [1e-300, 0.5])
def test_delta_moves_the_margin_alone(sizes: Sizes, delta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = (normal(n, sizes.width, generator) for n in sizes[:2])
    found = whitened_topk(keys, queries, 10, precision="int8", delta=delta)
    assert_same_hits(found, whitened_topk(keys, queries, 10, precision="fp64"))


def test_rows_beyond_float32_once_balanced_are_scored(sizes: Sizes) -> None:
    """Columns of very unlike sizes are scaled before they are rounded, and what then overflows is scored in float64."""
    generator = torch.Generator().manual_seed(0)
    keys, queries = normal(100, sizes.width, generator), normal(5, sizes.width, generator)
    keys[:, 1] *= 1e-20
    queries[:, 1] *= 1e20
    keys[77, 1] = 1e35
    queries[4, 0] = 3e38
    for dtype in (torch.bfloat16, torch.float32):
        found = whitened_topk(keys.to(dtype), queries, 3, precision="int8")
        assert_same_hits(found, whitened_topk(keys.to(dtype), queries, 3, precision="fp64"))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keys_that_are_no_numbers_are_found(sizes: Sizes, bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = normal(50, sizes.width, generator), normal(3, sizes.width, generator)
    keys[[7, 31], [0, sizes.width - 1]] = bad
    found = whitened_topk(keys, queries, 50, precision="int8", nonfinite="exclude")
    assert found.n_nonfinite == 2
    assert sorted(set(range(50)) - set(found.ids[0].tolist())) == [7, 31]
