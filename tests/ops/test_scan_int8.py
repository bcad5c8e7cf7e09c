"""The int8 pass on a GPU: the bounds of its products against the true error, balancing, odd shapes."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from cuda_bodies import needs_gpu, serve_by_executor
from hostile_rows import KINDS, normal, outlier_columns, subnormal
from scan_checks import FORCED, assert_is_top, exact_products, random_block, whitened_topk
from torch import Tensor

from rep_fast.ops import native, scan_int8
from rep_fast.ops.scan_int8 import DitheredQueries, Int8Chunks, prepare_dithered


@pytest.fixture(params=["cuda", "cuda-on-cpu"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The CUDA module of the body under test; `FORCED["device"]` tells where its tensors lie."""
    if request.param == "cuda":
        needs_gpu()
        monkeypatch.setitem(FORCED, "device", "cuda")
        found = native.find_cuda().module
    else:
        found = serve_by_executor(monkeypatch, "whitened_topk").module
    assert found is not None
    return found


def certified(module: ModuleType, queries: DitheredQueries, keys: Tensor) -> tuple[Tensor, Tensor]:
    """[S, N] float64 approximate scores of finite keys, and their margins."""
    counters = torch.zeros(2, dtype=torch.int64, device=keys.device)
    scored = Int8Chunks(module, queries, len(keys), counters).scored(keys, 0)
    assert int(counters[0]) == 0
    steps = queries.steps.double().unsqueeze(1)
    scores = scored["key_steps"].double() * steps * scored["approximate"][: len(queries.rows), : len(keys)].double()
    margins = scored["key_steps"].double() * queries.margins.double().unsqueeze(1) + steps * scored["norms"].double()
    return scores.cpu(), margins.cpu()


@pytest.mark.parametrize("width", [1, 7, 64, 301])
@pytest.mark.parametrize("of_queries", [normal, outlier_columns, subnormal], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("of_keys", KINDS, ids=lambda kind: kind.__name__)
def test_the_true_error_keeps_the_bound(
    module: ModuleType, of_keys: Callable[..., Tensor], of_queries: Callable[..., Tensor], width: int
) -> None:
    seed = secrets.randbits(60)
    generator = torch.Generator().manual_seed(seed)
    keys, rows = of_keys(21, width, generator), of_queries(9, width, generator)
    on_device = keys.to(FORCED["device"])
    queries = prepare_dithered(module, rows.to(FORCED["device"]), on_device, delta=1e-9, seed=secrets.randbits(63))
    scores, margins = certified(module, queries, on_device)
    exact, _ = exact_products(keys, rows)
    assert ((scores - exact).abs() <= margins).all(), f"seed {seed}"


def half_way(n: int, generator: torch.Generator) -> Tensor:
    """Every entry stands half-way between two steps, beside a single large one that sets the step."""
    rows = torch.randint(0, 2, (n, 128), generator=generator) - 0.5
    rows[:, 0] = 127
    return rows


def flat(n: int, generator: torch.Generator) -> Tensor:
    """Random signs where `half_way` is rounded."""
    rows = 2.0 * torch.randint(0, 2, (n, 128), generator=generator) - 1
    rows[:, 0] = 0
    return rows


@pytest.mark.parametrize("rounded", ["keys", "queries"])
def test_neither_term_of_the_bound_is_needless(
    module: ModuleType, rounded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one side alone is rounded Hoeffding's bound is nearly met: half of that side's term would not hold."""
    generator = torch.Generator().manual_seed(3)
    largest = 0.0
    for seed in range(4):
        keys, rows = half_way(4, generator), flat(150, generator)
        if rounded == "queries":
            keys, rows = rows, keys
        monkeypatch.setattr(scan_int8, "_LARGEST_SCAN", len(keys))
        on_device = keys.to(FORCED["device"])
        no_keys = on_device[:0]  # nothing is balanced, so that the entries stay where they are between two steps
        queries = prepare_dithered(module, rows.to(FORCED["device"]), no_keys, delta=0.1, seed=seed)
        scores, margins = certified(module, queries, on_device)
        share = (scores - exact_products(keys, rows)[0]).abs() / margins
        largest = max(largest, float(share.max()))
    assert 0.55 < largest <= 1.0


def test_margins_are_those_of_the_proof(module: ModuleType) -> None:
    """c·norm of either side beside the sum of magnitudes, and no more than 1e-3 of it for everything else."""
    keys, rows = random_block(30, 12, 500)
    device = FORCED["device"]
    queries = prepare_dithered(module, rows.to(device), keys.to(device), delta=1e-6, seed=1)
    c = math.sqrt(math.log(4 * 2.0**40 * 12 / 1e-6) / 2)
    scales = (queries.key_columns[:500] & -65536).view(torch.float32).reciprocal()
    norms = (rows.to(device).double() * scales).norm(dim=1)
    least = c * norms + 2.0**-15 * (rows.to(device).double() * scales).abs().sum(dim=1)
    assert (queries.margins.double() >= least).all()
    assert (queries.margins.double() <= (1 + 1e-3) * c * norms).all()


def test_balancing_takes_the_spread_of_columns_away(module: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-3, 3, 64)
    keys, rows = normal(40, 64, generator) * spread, normal(6, 64, generator) / spread
    keys[5, 7] = math.nan  # rows that are not finite have no say
    device = FORCED["device"]
    balanced = prepare_dithered(module, rows.to(device), keys.to(device), delta=1e-9, seed=0)
    plain = prepare_dithered(module, rows.to(device), keys[:0].to(device), delta=1e-9, seed=0)
    finite = torch.cat([keys[:5], keys[6:]]).to(device)
    _, narrow = certified(module, balanced, finite)
    _, wide = certified(module, plain, finite)
    assert narrow.mean() < wide.mean() / 50


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 1, 8), (17, 7, 9), (5, 40, 31)])
def test_shapes_that_the_product_has_to_be_padded_for(module: ModuleType, shape: tuple[int, ...]) -> None:
    n, m, width = shape
    keys, queries = random_block(n, m, width)
    for dtype in (torch.bfloat16, torch.float32):
        found = whitened_topk(keys.to(dtype), queries, 4, precision="int8")
        assert_is_top(found, *exact_products(keys.to(dtype), queries))


def test_nothing_to_scan(module: ModuleType) -> None:
    keys, queries = random_block(6, 3, 5)
    assert (whitened_topk(keys[:0], queries, 2, precision="int8").ids == -1).all()
    assert whitened_topk(keys, queries[:0], 2, precision="int8").ids.shape == (0, 2)


def test_a_query_that_is_not_finite_is_left_out(module: ModuleType) -> None:
    keys, queries = random_block(30, 4, 10)
    queries[2, 3] = math.inf
    found = whitened_topk(keys, queries, 3, precision="int8", nonfinite="exclude")
    assert found.dropped_queries.tolist() == [False, False, True, False]
    assert (found.ids[2] == -1).all()
    assert torch.equal(found.ids, whitened_topk(keys, queries, 3, precision="fp64", nonfinite="exclude").ids)
