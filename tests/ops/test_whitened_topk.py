from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from rep_fast import backend, errors, ops
from rep_fast.ops import LastTokenExclusion, PairExclusion, TopK, native, profile
from rep_fast.ops.whitened_topk import PASSES

pytestmark = pytest.mark.filterwarnings("ignore:whitened_topk. the plain torch body serves")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what "auto" stands for with bfloat16 keys: the choice by speed would leave passes out on some machines
_forced = {"bfloat16": "auto"}


def whitened_topk(keys: Tensor, queries: Tensor, k: int, *, precision: str = "auto", **options: Any) -> TopK:
    if precision == "auto" and keys.dtype == torch.bfloat16:
        precision = _forced["bfloat16"]
    return ops.whitened_topk(keys, queries, k, precision=precision, **options)


def bodies() -> list[str]:
    """Every level, every pass of bfloat16 products where the machine has them, and plain torch."""
    module = native.find().module
    if module is None:
        return ["reference"]
    levels = [module.level_name(row) for row in range(module.machine_level() + 1)]
    passes = [f"avx512_bf16 {name}" for name in ("bf16", "bf16x2", "int8") if "avx512_bf16" in levels]
    return [*levels, *passes, "reference"]


@pytest.fixture(params=bodies())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every body of this op in turn; the level's name."""
    name, _, forced = request.param.partition(" ")
    if name == "reference":
        monkeypatch.setattr(native, "find", lambda: native.Native(None, "the test hides it"))
    else:
        monkeypatch.setenv("REP_FAST_ISA", name)
    monkeypatch.setitem(_forced, "bfloat16", forced or "auto")
    return name


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


def random_block(
    n: int, m: int, width: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, width, generator=generator).to(dtype)
    return keys, torch.randn(m, width, generator=generator)


def exact_products(keys: Tensor, queries: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, float]:
    """Float64 scores [m, n], −∞ where excluded, and a bound on the difference of two float64 summation orders."""
    scores = queries.double() @ keys.double().T
    norms = keys.double().norm(dim=1).amax() * queries.double().norm(dim=1).amax() if scores.numel() else 0.0
    bound = 2 * keys.shape[1] * 2.0**-53 * float(norms)
    return (scores if excluded is None else scores.masked_fill(excluded.T, -torch.inf)), bound


def assert_is_top(result: TopK, scores: Tensor, bound: float, *, first_id: int = 0) -> None:
    """`result` is the top k of `scores`; ids are compared where the gap to both neighbours exceeds the bound."""
    k = min(result.k, scores.shape[1])
    want, order = scores.sort(dim=1, descending=True, stable=True)
    there = torch.isfinite(want[:, :k])
    assert torch.equal(result.ids[:, :k] >= 0, there)
    assert (result.ids[:, k:] == -1).all()
    assert (result.exact_scores[:, k:] == -math.inf).all()
    error = (result.exact_scores[:, :k] - want[:, :k])[there].abs()
    assert error.numel() == 0 or float(error.max()) <= bound
    gaps = want[:, :-1] - want[:, 1:]
    infinite = torch.full((scores.shape[0], 1), math.inf, dtype=torch.float64)
    clear = (torch.cat([infinite, gaps], 1) > 2 * bound) & (torch.cat([gaps, infinite], 1) > 2 * bound)
    compared = clear[:, :k] & there
    assert torch.equal(result.ids[:, :k][compared], order[:, :k][compared] + first_id)
    assert (result.exact_scores[:, :-1] >= result.exact_scores[:, 1:]).all()


def same_bits(a: TopK, b: TopK) -> bool:
    return (
        torch.equal(a.exact_scores, b.exact_scores)
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.dropped_queries, b.dropped_queries)
        and (a.n_keys_seen, a.n_nonfinite) == (b.n_keys_seen, b.n_nonfinite)
    )


# ---- against the float64 definition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_finds_the_float64_top_k(level: str, shape: tuple[int, ...], dtype: torch.dtype, precision: str) -> None:
    n, m, width, k = shape
    keys, queries = random_block(n, m, width, dtype=dtype)
    result = whitened_topk(keys, queries, k, precision=precision)
    assert_is_top(result, *exact_products(keys, queries))
    assert result.scores.dtype == torch.float32
    assert (result.k, result.n_keys_seen, result.n_nonfinite) == (k, n, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honours_row_strides(level: str, dtype: torch.dtype) -> None:
    keys, queries = random_block(40, 9, 70, dtype=dtype)
    result = whitened_topk(keys[::3, 5:38], queries[1::2, 5:38], 6)
    assert_is_top(result, *exact_products(keys[::3, 5:38], queries[1::2, 5:38]))


def test_every_level_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = random_block(150, 40, 300, dtype=torch.bfloat16)
    results = []
    for name in ("portable", "avx2", "avx512", "avx512_bf16"):
        monkeypatch.setenv("REP_FAST_ISA", name)
        passes = ("fp32", "fp64", *(("bf16", "bf16x2", "int8") if has_bf16_products() else ()))
        results += [whitened_topk(keys, queries, 8, precision=precision) for precision in passes]
    assert all(same_bits(results[0], other) for other in results[1:])


def has_bf16_products() -> bool:
    return backend()["whitened_topk"][0] == "native-avx512_bf16"


def test_the_pass_that_ran_is_told(level: str) -> None:
    keys, queries = random_block(300, 20, 256, dtype=torch.bfloat16)
    result = whitened_topk(keys, queries, 5)
    told = dict(zip(PASSES, result.pass_counts, strict=True))
    # by measured speed of the two products, where there are both
    possible = {"fp64"} if level == "reference" else set(PASSES[1:]) if has_bf16_products() else {"fp32"}
    assert sum(told.values()) == 300 == sum(told[name] for name in possible)
    second = whitened_topk(keys, queries, 5, precision="fp64", state=result, first_id=300)
    assert second.pass_counts[0] >= 300
    assert sum(second.pass_counts) == second.n_keys_seen == 600
    merged = result.merge(whitened_topk(keys, queries, 5, precision="fp64", first_id=300))
    assert same_bits(merged, second)
    assert merged.pass_counts == second.pass_counts


@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
def test_a_pass_that_is_not_there_is_refused_by_name(level: str, precision: str) -> None:
    keys, queries = random_block(30, 4, 20)
    with pytest.raises(errors.BackendError, match=f"precision '{precision}' needs bfloat16 keys .* precision='auto'"):
        whitened_topk(keys, queries, 2, precision=precision)
    if not has_bf16_products():
        with pytest.raises(errors.BackendError, match="a processor with AVX-512 BF16"):
            whitened_topk(keys.bfloat16(), queries, 2, precision=precision)


def test_int8_is_refused_where_it_cannot_run(level: str) -> None:
    width = 65537 if has_bf16_products() else 20
    with pytest.raises(
        errors.BackendError, match="precision 'int8' needs keys at most 65536 wide and a processor with"
    ):
        whitened_topk(torch.zeros(2, width), torch.zeros(1, width), 2, precision="int8")


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e8])
@pytest.mark.parametrize("precision", ["auto", "bf16", "bf16x2", "int8", "fp32"])
@pytest.mark.parametrize("seed", range(3))
def test_ill_conditioned_keys_lose_no_hit(condition: float, precision: str, seed: int) -> None:
    """Keys of a wide spectrum against whitened queries, where a plain bfloat16 product loses part of the top ten."""
    if precision in ("bf16", "bf16x2", "int8") and not has_bf16_products():
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
def test_too_few_candidates_leave_empty_places(level: str, n: int, m: int, k: int) -> None:
    keys, queries = random_block(n, m, 12)
    assert_is_top(whitened_topk(keys, queries, k, first_id=7), *exact_products(keys, queries), first_id=7)


def test_ties_keep_the_lower_id(level: str) -> None:
    keys = torch.randint(-1, 2, (200, 6), generator=torch.Generator().manual_seed(3)).float()
    queries = torch.randint(-1, 2, (12, 6), generator=torch.Generator().manual_seed(4)).float()
    scores, _ = exact_products(keys, queries)
    result = whitened_topk(keys, queries, 30)
    assert torch.equal(result.ids, scores.sort(dim=1, descending=True, stable=True).indices[:, :30])


# ---- numbers the float32 pass cannot decide -------------------------------------------------------------------------


def test_is_exact_where_float32_is_wrong(level: str) -> None:
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
def test_survives_overflow_and_underflow_of_float32(level: str, scale: float, dtype: torch.dtype) -> None:
    keys, queries = random_block(120, 18, 40)
    keys, queries = keys * scale, queries * scale
    keys[::7] /= scale
    keys = keys.to(dtype)
    assert_is_top(whitened_topk(keys, queries, 9), *exact_products(keys, queries))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_subnormals_when_torch_flushes_them(level: str, dtype: torch.dtype) -> None:
    keys, queries = random_block(60, 5, 24)
    keys = (keys * 1e-40).to(dtype)
    scores, bound = exact_products(keys, queries)
    if level == "reference":
        pytest.skip("torch's own products follow its setting")
    assert torch.set_flush_denormal(True)
    try:
        result = whitened_topk(keys, queries, 4)
    finally:
        torch.set_flush_denormal(False)
    assert_is_top(result, scores, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_margins_hold_when_torch_flushes_subnormals(level: str, dtype: torch.dtype) -> None:
    """Margins and starting thresholds are products of tiny norms: flushed to zero they would let the right hits go."""
    if level == "reference":
        pytest.skip("torch's own products follow its setting")
    for seed in range(20):
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
def test_reads_every_finite_16_bit_pattern(level: str, dtype: torch.dtype) -> None:
    keys = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    keys = keys[torch.isfinite(keys).all(dim=1)]
    result = whitened_topk(keys, torch.tensor([[1.0], [-1.0]]), keys.shape[0])
    want = keys.double().squeeze(1).sort(descending=True, stable=True)
    assert torch.equal(result.exact_scores[0], want.values)
    assert torch.equal(result.ids[0], want.indices)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "width"), [(7, 17, 257), (1, 1, 1), (97, 3, 9), (5, 16, 31)])
def test_reads_nothing_beyond_the_tensors(
    level: str, dtype: torch.dtype, n: int, m: int, width: int, before_unreadable_page: Callable[[Tensor], Tensor]
) -> None:
    keys, queries = (before_unreadable_page(t) for t in random_block(n, m, width, dtype=dtype))
    tokens = before_unreadable_page(torch.arange(n))
    rule = LastTokenExclusion(tokens, torch.tensor([0]), before_unreadable_page(torch.arange(m)), window=1)
    result = whitened_topk(keys, queries, 3, exclusion=rule)
    assert_is_top(result, *exact_products(keys, queries, brute_force(rule, n)))


# ---- exclusion ------------------------------------------------------------------------------------------------------


def brute_force(rule: LastTokenExclusion, n: int) -> Tensor:
    """[n, m] the rule word by word, from the sequences written out."""
    lookback = [] if rule.lookback is None else rule.lookback.tolist()
    starts, tokens, last_tokens = rule.sequence_starts.tolist(), rule.token_ids.tolist(), rule.last_tokens.tolist()
    mask = torch.zeros(n, len(last_tokens), dtype=torch.bool)
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else n
        before = lookback if number == 0 else []
        sequence = before + tokens[start:end]
        for row in range(start, end):
            place = row - start + len(before)
            seen = sequence[max(0, place - rule.window) : place + 1]
            mask[row] = torch.tensor([token in seen for token in last_tokens], dtype=torch.bool)
    return mask


@pytest.mark.parametrize("window", [0, 3, 10, 400])
@pytest.mark.parametrize("n_before", [None, 0, 2, 25])
def test_last_token_rule_is_the_mask(level: str, window: int, n_before: int | None) -> None:
    generator = torch.Generator().manual_seed(window)
    keys, queries = random_block(230, 21, 20)
    rule = LastTokenExclusion(
        token_ids=torch.randint(0, 12, (230,), generator=generator),
        sequence_starts=torch.tensor([0, 1, 4, 96, 97, 190, 229]),
        last_tokens=torch.randint(0, 14, (21,), generator=generator),
        window=window,
        lookback=None if n_before is None else torch.randint(0, 12, (n_before,), generator=generator),
    )
    mask = brute_force(rule, 230)
    assert 0 < int(mask.sum()) < mask.numel()
    for precision in ("fp32", "fp64"):
        result = whitened_topk(keys, queries, 15, exclusion=rule, precision=precision)
        assert_is_top(result, *exact_products(keys, queries, mask))


def test_tail_carries_a_sequence_into_the_next_block(level: str) -> None:
    generator = torch.Generator().manual_seed(8)
    keys, queries = random_block(60, 9, 20)
    tokens, last_tokens = torch.randint(0, 9, (60,), generator=generator), torch.arange(9)
    whole = LastTokenExclusion(tokens, torch.tensor([0, 10]), last_tokens, window=4)
    want = whitened_topk(keys, queries, 8, exclusion=whole)
    state, lookback = None, None
    for start, end, starts in ((0, 12, [0, 10]), (12, 14, [0]), (14, 60, [0])):
        rule = LastTokenExclusion(tokens[start:end], torch.tensor(starts), last_tokens, window=4, lookback=lookback)
        state = whitened_topk(keys[start:end], queries, 8, exclusion=rule, state=state, first_id=start)
        lookback = rule.tail()
        assert lookback.numel() <= 4
    assert state is not None
    assert same_bits(state, want)


def test_pair_rule_is_the_mask(level: str) -> None:
    keys, queries = random_block(1100, 14, 20)
    mask = torch.rand(1100, 14, generator=torch.Generator().manual_seed(2)) < 0.3
    mask[5] = True
    mask[6] = False
    rows, subjects = mask.nonzero(as_tuple=True)
    rule = PairExclusion(torch.searchsorted(rows, torch.arange(1101)), subjects)
    assert_is_top(whitened_topk(keys, queries, 12, exclusion=rule), *exact_products(keys, queries, mask))


def test_everything_excluded_leaves_nothing(level: str) -> None:
    keys, queries = random_block(30, 2, 5)
    rule = LastTokenExclusion(torch.ones(30, dtype=torch.int64), torch.tensor([0]), torch.tensor([1, 1]))
    result = whitened_topk(keys, queries, 3, exclusion=rule)
    assert (result.ids == -1).all()
    assert (result.scores == -math.inf).all()


# ---- streams --------------------------------------------------------------------------------------------------------


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, list[int]]:
    """Small integer keys (many ties), queries, k, and the cuts of the stream into blocks."""
    n, m, width = draw(st.integers(1, 130)), draw(st.integers(1, 20)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keys = torch.randint(-2, 3, (n, width), generator=generator).to(draw(st.sampled_from(DTYPES)))
    queries = torch.randint(-2, 3, (m, width), generator=generator).float()
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return keys, queries, draw(st.integers(1, 12)), [0, *cuts, n]


@given(streams(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_blocks_and_threads_do_not_matter(stream: tuple[Tensor, Tensor, int, list[int]], n_threads: int) -> None:
    keys, queries, k, cuts = stream
    before = torch.get_num_threads()
    want = whitened_topk(keys, queries, k)
    fed, merged = TopK.empty(queries.shape[0], k), TopK.empty(queries.shape[0], k)
    try:
        torch.set_num_threads(n_threads)
        for start, end in itertools.pairwise(cuts):
            fed = whitened_topk(keys[start:end], queries, k, state=fed, first_id=start)
            merged = whitened_topk(keys[start:end], queries, k, first_id=start).merge(merged)
    finally:
        torch.set_num_threads(before)
    assert same_bits(fed, want)
    assert same_bits(merged, want)


@given(streams())
@settings(max_examples=30, deadline=None)
def test_merge_is_associative_and_commutative(stream: tuple[Tensor, Tensor, int, list[int]]) -> None:
    keys, queries, k, cuts = stream
    thirds = [0, min(cuts), len(keys) // 2, len(keys)]
    a, b, c = (whitened_topk(keys[start:end], queries, k, first_id=start) for start, end in itertools.pairwise(thirds))
    assert same_bits(a.merge(b), b.merge(a))
    assert same_bits(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same_bits(a.merge(TopK.empty(queries.shape[0], k)), a)


@given(streams(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_order_of_keys_changes_only_ids(stream: tuple[Tensor, Tensor, int, list[int]], seed: int) -> None:
    keys, queries, k, _ = stream
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    result, permuted = whitened_topk(keys, queries, k), whitened_topk(keys[order], queries, k)
    assert torch.equal(result.exact_scores, permuted.exact_scores)
    for row, ids in enumerate(permuted.ids):
        there = ids[ids >= 0]
        assert there.unique().numel() == there.numel()
        scores = keys[order[there]].double() @ queries[row].double()
        assert torch.equal(scores, permuted.exact_scores[row, : there.numel()])


@given(streams())
@settings(max_examples=30, deadline=None)
def test_more_keys_never_lower_a_score(stream: tuple[Tensor, Tensor, int, list[int]]) -> None:
    keys, queries, k, cuts = stream
    fewer, all_keys = whitened_topk(keys[: cuts[-2]], queries, k), whitened_topk(keys, queries, k)
    assert (all_keys.exact_scores >= fewer.exact_scores).all()


def test_state_goes_through_safetensors() -> None:
    keys, queries = random_block(20, 3, 8)
    keys[4, 2] = torch.nan
    result = whitened_topk(keys, queries, 30, nonfinite="exclude")
    assert same_bits(TopK.from_tensors(load(save(result.to_tensors()))), result)


def test_state_is_not_changed(level: str) -> None:
    keys, queries = random_block(20, 3, 8)
    state = whitened_topk(keys, queries, 4)
    copy = TopK.from_tensors({name: t.clone() for name, t in state.to_tensors().items()})
    whitened_topk(keys * 2, queries, 4, state=state, first_id=20)
    assert same_bits(state, copy)


# ---- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_keys(level: str, bad: float, precision: str, dtype: torch.dtype) -> None:
    keys, queries = random_block(210, 700, 40, dtype=dtype)
    keys[103, 39] = bad
    keys[200, 0] = bad
    with pytest.raises(errors.NonFiniteError, match=r"keys hold a NaN or infinity in row 103 \(id 1103\)"):
        whitened_topk(keys, queries, 4, first_id=1000, precision=precision)
    result = whitened_topk(keys, queries, 4, precision=precision, nonfinite="exclude")
    excluded = torch.zeros(210, 700, dtype=torch.bool)
    excluded[[103, 200]] = True
    assert_is_top(result, *exact_products(keys.nan_to_num(0.0, 0.0, 0.0), queries, excluded))
    assert (result.n_nonfinite, result.n_keys_seen) == (2, 210)


def test_nonfinite_queries(level: str) -> None:
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


# ---- the door -------------------------------------------------------------------------------------------------------

KEYS, QUERIES = random_block(4, 2, 3)
STARTS = torch.tensor([0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keys": KEYS.double()}, r"keys must be \(tokens, width\) bfloat16\|float16\|float32, got \(4, 3\) float64"),
        ({"keys": KEYS[0]}, r"keys must be \(tokens, width\) .* got \(3,\) float32"),
        ({"queries": QUERIES.half()}, r"queries must be \(queries, width\) float32, got \(2, 3\) float16"),
        ({"queries": QUERIES[:, :2]}, "keys are 3 wide, queries 2"),
        ({"keys": KEYS[:3].T}, r"columns of keys must be contiguous, got stride 3; call .contiguous\(\)"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"first_id": -1}, "first_id must be at least 0, got -1"),
        ({"precision": "tf32"}, "precision must be one of auto, fp64, fp32, bf16, bf16x2, int8, got 'tf32'"),
        ({"nonfinite": "skip"}, "nonfinite must be one of raise, exclude, got 'skip'"),
        ({"delta": 0.0}, "delta must lie between 0 and 1, got 0.0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*63\), got -1"),
        ({"state": TopK.empty(2, 3)}, "the state keeps k=3 hits, asked for k=2"),
        ({"state": TopK.empty(5, 2)}, r"the state is \(5, 2\), but there are 2 queries"),
        ({"queries": QUERIES.to("meta")}, "keys are on cpu, queries on meta"),
        (
            {"exclusion": LastTokenExclusion(torch.arange(3), STARTS, torch.arange(2))},
            "exclusion has 3 tokens and 2 last tokens, but there are 4 keys and 2 queries",
        ),
        ({"exclusion": PairExclusion(torch.tensor([0, 0]), STARTS[:0])}, "exclusion has 1 rows, but there are 4 keys"),
        (
            {"exclusion": PairExclusion(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([2]))},
            "exclusion lists query 2 or a negative one, but there are 2 queries",
        ),
    ],
)
def test_arguments_that_do_not_fit(level: str, changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"keys": KEYS, "queries": QUERIES, "k": 2} | changed
    with pytest.raises(errors.HparamError, match=message):
        whitened_topk(arguments.pop("keys"), arguments.pop("queries"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LastTokenExclusion(KEYS, STARTS, STARTS), "token_ids must be one-dimensional int64, got"),
        (lambda: LastTokenExclusion(STARTS, STARTS[:0], STARTS), "sequence_starts must be ascending"),
        (lambda: LastTokenExclusion(torch.arange(4), torch.tensor([1]), STARTS), "sequence_starts must be ascending"),
        (lambda: LastTokenExclusion(torch.arange(4), torch.tensor([0, 2, 2]), STARTS), "sequence_starts must be"),
        (lambda: LastTokenExclusion(torch.arange(4), torch.tensor([0, 4]), STARTS), "reaches row 4, but there are 4"),
        (lambda: LastTokenExclusion(STARTS, STARTS, STARTS, window=-1), "window must be at least 0, got -1"),
        (lambda: PairExclusion(torch.tensor([0, 2]), STARTS), "indptr must run from 0 to 1"),
        (lambda: PairExclusion(torch.tensor([0, 1, 0, 1]), STARTS), "not descending"),
        (lambda: TopK.empty(2, 0), "needs k >= 1"),
        (lambda: TopK.empty(2, 1).merge(TopK.empty(2, 2)), r"differ, \(2, 1\) and \(2, 2\)"),
        (
            lambda: TopK.from_tensors({"ids": STARTS}),
            "needs the tensors counts, dropped_queries, exact_scores, ids, pass_counts",
        ),
        (lambda: TopK.from_tensors(TopK.empty(2, 1).to_tensors() | {"ids": STARTS}), "the tensors do not fit together"),
    ],
)
def test_states_and_rules_that_do_not_fit(build: Any, message: str) -> None:
    with pytest.raises(errors.HparamError, match=message):
        build()


@pytest.mark.parametrize("with_rule", [False, True])
def test_passes_opcheck(level: str, with_rule: bool) -> None:
    keys, queries = random_block(20, 4, 6)
    state = TopK.empty(4, 3)
    rule = LastTokenExclusion(torch.arange(20), STARTS, torch.arange(4)).arguments() if with_rule else {}
    names = ("token_ids", "sequence_starts", "last_tokens", "lookback", "window", "indptr", "subjects")
    rest = [rule.get(name, 0 if name == "window" else None) for name in names]
    arguments = (keys, queries, state.exact_scores, state.ids, 0, *rest, "fp32", 1e-9, 0)
    torch.library.opcheck(torch.ops.rep_fast.whitened_topk.default, arguments)


def test_warns_when_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find", lambda: native.Native(None, "it was not built"))
    with pytest.warns(RuntimeWarning, match="the plain torch body serves, since it was not built"):
        whitened_topk(KEYS, QUERIES, 2)


def test_profile_counts_the_work(level: str) -> None:
    keys, queries = random_block(10, 4, 6, dtype=torch.bfloat16)
    with profile() as calls:
        whitened_topk(keys, queries, 3)
    whitened_topk(keys, queries, 3)
    (call,) = calls
    assert (call.op, call.flops) == ("whitened_topk", 2 * 10 * 4 * 6)
    assert call.bytes == 10 * 6 * 2 + 4 * 6 * 4 + 2 * 4 * 3 * 16
    assert call.backend == ("reference" if level == "reference" else f"native-{level}")
    assert call.elapsed > 0
