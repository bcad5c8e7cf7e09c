"""The collision scan against its float64 definition, on ordinary and on hostile numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scan_checks import (
    DTYPES,
    FORCED,
    assert_is_top,
    brute_force,
    exact_products,
    has_dot_products,
    random_block,
    same_bits,
    whitened_topk,
)
from torch import Tensor

from rep_fast import errors
from rep_fast.ops import LastTokenExclusion, TopK
from rep_fast.ops.topk_state import PASSES, REASONS

pytestmark = pytest.mark.filterwarnings("ignore:whitened_topk. the plain torch body serves")

# (keys, queries, width, k): ones, primes, beside each tile (6 keys, 16 queries, depth 256, blocks of 96)
SHAPES = (
    (1, 1, 1, 1),
    (5, 15, 255, 3),
    (7, 17, 257, 7),
    (95, 16, 256, 5),
    (97, 1, 16, 97),
    (101, 31, 13, 10),
    (193, 33, 511, 4),
    (3, 513, 33, 2),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_finds_the_float64_top_k(scan_level: str, shape: tuple[int, ...], dtype: torch.dtype, precision: str) -> None:
    n, m, width, k = shape
    keys, queries = random_block(n, m, width, dtype=dtype)
    result = whitened_topk(keys, queries, k, precision=precision)
    assert_is_top(result, *exact_products(keys, queries))
    assert result.scores.dtype == torch.float32
    assert (result.k, result.n_keys_seen, result.n_nonfinite) == (k, n, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honours_row_strides(scan_level: str, dtype: torch.dtype) -> None:
    keys, queries = random_block(40, 9, 70, dtype=dtype)
    result = whitened_topk(keys[::3, 5:38], queries[1::2, 5:38], 6)
    assert_is_top(result, *exact_products(keys[::3, 5:38], queries[1::2, 5:38]))


def test_every_level_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = random_block(150, 40, 300, dtype=torch.bfloat16)
    results = []
    for name in ("portable", "avx2", "avx512", "avx512_bf16"):
        monkeypatch.setenv("REP_FAST_ISA", name)
        passes = ("fp32", "fp64", *(("bf16", "bf16x2", "int8") if has_dot_products() else ()))
        results += [whitened_topk(keys, queries, 8, precision=precision) for precision in passes]
    assert all(same_bits(results[0], other) for other in results[1:])


def test_the_pass_that_ran_is_told(scan_level: str) -> None:
    keys, queries = random_block(300, 20, 256, dtype=torch.bfloat16)
    result = whitened_topk(keys, queries, 5)
    told = dict(zip(PASSES, result.pass_counts, strict=True))
    # by measured speed of the two products, where there are both
    on_cpu = set(PASSES[1:]) if has_dot_products() else {"fp32"}
    on_gpu = {FORCED["bfloat16"].replace("auto", "bf16")}
    possible = {"reference": {"fp64"}, "cuda": on_gpu, "cuda-on-cpu": on_gpu}.get(scan_level, on_cpu)
    assert sum(told.values()) == 300 == sum(told[name] for name in possible)
    second = whitened_topk(keys, queries, 5, precision="fp64", state=result, first_id=300)
    assert second.pass_counts[0] >= 300
    assert sum(second.pass_counts) == second.n_keys_seen == 600
    merged = result.merge(whitened_topk(keys, queries, 5, precision="fp64", first_id=300))
    assert same_bits(merged, second)
    assert merged.pass_counts == second.pass_counts


def test_the_reason_is_told(scan_level: str) -> None:
    keys, queries = random_block(300, 20, 256, dtype=torch.bfloat16)
    result = whitened_topk(keys, queries, 5)
    (chosen,) = (name for name, count in zip(PASSES, result.pass_counts, strict=True) if count)
    # the level's name may hold a pass, which is then asked for
    has_choice = has_dot_products() and not scan_level.startswith("cuda")
    is_asked_for = scan_level.startswith("cuda") and FORCED["bfloat16"] != "auto"
    possible = (REASONS[0], *REASONS[2:]) if has_choice else REASONS[:1] if is_asked_for else REASONS[1:2]
    assert result.reason in [f"{chosen}: {reason}" for reason in possible]
    assert TopK.empty(20, 5).reason == ""
    second = whitened_topk(keys[:100], queries, 5, precision="fp64", state=result, first_id=300)
    assert sum(second.reason_counts) == second.n_keys_seen == 400
    if scan_level in ("portable", "avx2", "avx512"):
        assert second.reason == f"fp64 (100 keys), fp32 (300 keys): {REASONS[0]} (100 keys), {REASONS[1]} (300 keys)"
    merged = result.merge(whitened_topk(keys[:100], queries, 5, precision="fp64", first_id=300))
    assert merged.reason_counts == second.reason_counts


@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
def test_a_pass_that_is_not_there_is_refused_by_name(scan_level: str, precision: str) -> None:
    keys, queries = random_block(30, 4, 20)
    is_on_gpu = scan_level.startswith("cuda")
    if is_on_gpu and precision == "bf16x2":
        assert_is_top(whitened_topk(keys, queries, 2, precision=precision), *exact_products(keys, queries))
        return
    with pytest.raises(errors.BackendError, match=f"precision '{precision}' needs bfloat16 keys .* precision='auto'"):
        whitened_topk(keys, queries, 2, precision=precision)
    if not (has_dot_products() or is_on_gpu):
        with pytest.raises(errors.BackendError, match="a processor with AVX-512 BF16"):
            whitened_topk(keys.bfloat16(), queries, 2, precision=precision)


def test_int8_is_refused_where_it_cannot_run(scan_level: str) -> None:
    width = 65537 if has_dot_products() or scan_level.startswith("cuda") else 20
    with pytest.raises(
        errors.BackendError, match="precision 'int8' needs keys at most 65536 wide and a processor with"
    ):
        whitened_topk(torch.zeros(2, width), torch.zeros(1, width), 2, precision="int8")


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e8])
@pytest.mark.parametrize("precision", ["auto", "bf16", "bf16x2", "int8", "fp32"])
@pytest.mark.parametrize("seed", range(3))
def test_ill_conditioned_keys_lose_no_hit(condition: float, precision: str, seed: int) -> None:
    """Keys of a wide spectrum against whitened queries, where a plain bfloat16 product loses part of the top ten."""
    if precision in ("bf16", "bf16x2", "int8") and not has_dot_products():
        pytest.skip("needs AVX-512 BF16 and VNNI")
    generator = torch.Generator().manual_seed(seed)
    width = 192
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.logspace(0, -math.log10(condition), width, dtype=torch.float64)
    mixing = basis * spectrum.sqrt()
    keys = (torch.randn(3000, width, generator=generator, dtype=torch.float64) @ mixing.T).bfloat16()
    stars = torch.randn(40, width, generator=generator, dtype=torch.float64) @ mixing.T
    queries = ((stars @ basis / spectrum) @ basis.T).float()
    result = whitened_topk(keys, queries, 10, precision=precision)
    assert torch.equal(result.ids, whitened_topk(keys, queries, 10, precision="fp64").ids)


@pytest.mark.parametrize(("n", "m", "k"), [(0, 3, 2), (4, 0, 2), (2, 3, 5)])
def test_too_few_candidates_leave_empty_places(scan_level: str, n: int, m: int, k: int) -> None:
    keys, queries = random_block(n, m, 12)
    assert_is_top(whitened_topk(keys, queries, k, first_id=7), *exact_products(keys, queries), first_id=7)


def test_ties_keep_the_lower_id(scan_level: str) -> None:
    keys = torch.randint(-1, 2, (200, 6), generator=torch.Generator().manual_seed(3)).float()
    queries = torch.randint(-1, 2, (12, 6), generator=torch.Generator().manual_seed(4)).float()
    scores, _ = exact_products(keys, queries)
    result = whitened_topk(keys, queries, 30)
    assert torch.equal(result.ids, scores.sort(dim=1, descending=True, stable=True).indices[:, :30])


# ---- numbers the float32 pass cannot decide --------------------------------------------------------------------------


def test_is_exact_where_float32_is_wrong(scan_level: str) -> None:
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(512, generator=generator)
    keys = 1000 * common + 0.01 * torch.randn(400, 512, generator=generator)
    queries = torch.randn(20, 512, generator=generator)
    queries -= (queries @ common / common.dot(common)).unsqueeze(1) * common
    scores, bound = exact_products(keys, queries)
    assert not torch.equal((queries @ keys.T).topk(10).indices, scores.topk(10).indices)
    assert_is_top(whitened_topk(keys, queries, 10), scores, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e19, 1e30, 3e37])
def test_survives_overflow_and_underflow_of_float32(scan_level: str, scale: float, dtype: torch.dtype) -> None:
    keys, queries = random_block(120, 18, 40)
    keys, queries = keys * scale, queries * scale
    keys[::7] /= scale
    keys = keys.to(dtype)
    assert_is_top(whitened_topk(keys, queries, 9), *exact_products(keys, queries))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_subnormals_when_torch_flushes_them(scan_level: str, dtype: torch.dtype) -> None:
    keys, queries = random_block(60, 5, 24)
    keys = (keys * 1e-40).to(dtype)
    scores, bound = exact_products(keys, queries)
    if scan_level == "reference":
        pytest.skip("torch's own products follow its setting")
    assert torch.set_flush_denormal(True)
    try:
        result = whitened_topk(keys, queries, 4)
    finally:
        torch.set_flush_denormal(False)
    assert_is_top(result, scores, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_margins_hold_when_torch_flushes_subnormals(scan_level: str, dtype: torch.dtype) -> None:
    """Margins and starting thresholds are products of tiny norms: flushed to zero they would let the right hits go."""
    if scan_level == "reference":
        pytest.skip("torch's own products follow its setting")
    for seed in range(3 if scan_level == "cuda-on-cpu" else 20):  # the executor takes its time
        keys, queries = (1e-22 * part for part in random_block(400, 5, 300, seed=seed))
        keys = keys.to(dtype)
        wanted = whitened_topk(keys, queries, 10, precision="fp64")
        assert torch.set_flush_denormal(True)
        try:
            found = whitened_topk(keys, queries, 10)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(found.ids, wanted.ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reads_every_finite_16_bit_pattern(
    scan_level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scan_level.startswith("cuda"):
        monkeypatch.setitem(FORCED, "bfloat16", "auto")  # the plain body keeps so many hits, and it has no int8
    keys = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    keys = keys[torch.isfinite(keys).all(dim=1)]
    result = whitened_topk(keys, torch.tensor([[1.0], [-1.0]]), keys.shape[0])
    want = keys.double().squeeze(1).sort(descending=True, stable=True)
    assert torch.equal(result.exact_scores[0], want.values)
    assert torch.equal(result.ids[0], want.indices)


# ---- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_keys(scan_level: str, bad: float, precision: str, dtype: torch.dtype) -> None:
    n_queries = 7 if scan_level == "cuda-on-cpu" else 700  # more than a tile; the executor takes its time
    keys, queries = random_block(210, n_queries, 40, dtype=dtype)
    keys[103, 39] = bad
    keys[200, 0] = bad
    with pytest.raises(errors.NonFiniteError, match=r"keys hold a NaN or infinity in row 103 \(id 1103\)"):
        whitened_topk(keys, queries, 4, first_id=1000, precision=precision)
    result = whitened_topk(keys, queries, 4, precision=precision, nonfinite="exclude")
    excluded = torch.zeros(210, n_queries, dtype=torch.bool)
    excluded[[103, 200]] = True
    assert_is_top(result, *exact_products(keys.nan_to_num(0.0, 0.0, 0.0), queries, excluded))
    assert (result.n_nonfinite, result.n_keys_seen) == (2, 210)


def test_nonfinite_queries(scan_level: str) -> None:
    keys, queries = random_block(30, 20, 10)
    queries[18, 3] = torch.inf
    with pytest.raises(errors.NonFiniteError, match="queries hold a NaN or infinity in row 18"):
        whitened_topk(keys, queries, 4)
    result = whitened_topk(keys, queries, 4, nonfinite="exclude")
    assert result.dropped_queries.nonzero().tolist() == [[18]]
    assert (result.ids[18] == -1).all()
    rest = torch.arange(20) != 18
    want = whitened_topk(keys, queries[rest], 4)
    assert torch.equal(result.ids[rest], want.ids)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "width"), [(7, 17, 257), (1, 1, 1), (97, 3, 9), (5, 16, 31)])
def test_reads_nothing_beyond_the_tensors(
    scan_level: str, dtype: torch.dtype, n: int, m: int, width: int, before_unreadable_page: Callable[[Tensor], Tensor]
) -> None:
    keys, queries = (before_unreadable_page(t) for t in random_block(n, m, width, dtype=dtype))
    tokens = before_unreadable_page(torch.arange(n))
    rule = LastTokenExclusion(tokens, torch.tensor([0]), before_unreadable_page(torch.arange(m)), window=1)
    result = whitened_topk(keys, queries, 3, exclusion=rule)
    assert_is_top(result, *exact_products(keys, queries, brute_force(rule, n)))
