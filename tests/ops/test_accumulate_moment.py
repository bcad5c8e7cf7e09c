from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rep_fast import backend, ops
from rep_fast.errors import BackendError, HparamError, NonFiniteError, SingularMomentError
from rep_fast.ops import MomentSum, native, profile
from rep_fast.ops.accumulate_moment import BLOCK_ROWS
from rep_fast.reference import accumulate_moment as reference

pytestmark = pytest.mark.filterwarnings("ignore:accumulate_moment. the plain torch body serves")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (tokens, width): ones, primes, beside the panel of 48 columns, the 384 of a task and the blocks of 64 and 2048 tokens
SHAPES = ((1, 1), (3, 47), (63, 48), (65, 49), (130, 383), (7, 385), (2047, 13), (2049, 11))
# what "auto" stands for with bfloat16 keys: the choice by speed would leave products out on some machines
_forced = {"bfloat16": "auto"}


def accumulate_moment(total: MomentSum, keys: Tensor, **options: Any) -> MomentSum:
    if keys.dtype == torch.bfloat16:
        options.setdefault("precision", _forced["bfloat16"])
    return ops.accumulate_moment(total, keys, **options)


def bodies() -> list[str]:
    """Every level, products of bfloat16 where the machine has them, and plain torch."""
    module = native.find().module
    if module is None:
        return ["reference"]
    levels = [module.level_name(row) for row in range(module.machine_level() + 1)]
    return [*levels, *(["avx512_bf16 bf16"] if "avx512_bf16" in levels else []), "reference"]


@pytest.fixture(params=bodies())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every body of this op in turn, the one of bfloat16 products too; the level's name."""
    name, _, forced = request.param.partition(" ")
    if name == "reference":
        monkeypatch.setattr(native, "find", lambda: native.Native(None, "the test hides it"))
    else:
        monkeypatch.setenv("REP_FAST_ISA", name)
    monkeypatch.setitem(_forced, "bfloat16", forced or "auto")
    return name


def random_keys(n: int, width: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_native(keys: Tensor) -> bool:
    return keys.dtype != torch.float64 and backend()["accumulate_moment"][0] != "reference"


def assert_is_moment(lower: Tensor, before: Tensor, keys: Tensor) -> None:
    """The longest chain of float32 additions times 2⁻²⁴, in units of Σ|k_i k_j|: 64 and one per 64 of 2048 tokens in
    the native bodies, all of a block in plain torch."""
    wide = keys.double().abs()
    n_tokens = keys.shape[0]
    chain = min(n_tokens, 64) + -(-min(n_tokens, 2048) // 64)
    depth = chain if is_native(keys) else min(n_tokens, BLOCK_ROWS)
    eps = 2.0**-53 if keys.dtype == torch.float64 else 2.0**-24
    bound = (depth + 1) * eps * (wide.T @ wide) + 2.0**-50 * before.abs() + 1e-300
    error = (lower.tril() - reference.accumulate_moment(before, keys).tril()).abs()
    assert bool((error <= bound).all()), f"error {float((error / bound).max()):.2f} times the bound"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(level: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    keys = random_keys(*shape, dtype=dtype)
    total = MomentSum.zeros(shape[1])
    total.lower += random_keys(shape[1], shape[1], dtype=torch.float64, seed=1)
    before = total.lower.clone()
    assert accumulate_moment(total, keys) is total
    assert total.count == shape[0]
    assert_is_moment(total.lower, before.tril(), keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_rows_columns_and_mask(level: str, dtype: torch.dtype) -> None:
    wide = random_keys(2 * 71, 60, dtype=dtype)
    total, masked, transposed = (MomentSum.zeros(51) for _ in range(3))
    keys = wide[::2, 5:56]
    accumulate_moment(total, keys)
    assert_is_moment(total.lower, torch.zeros(51, 51, dtype=torch.float64), keys)
    mask = torch.arange(71) % 3 == 1
    accumulate_moment(masked, keys, mask=mask)
    assert masked.count == int(mask.sum())
    assert_is_moment(masked.lower, torch.zeros(51, 51, dtype=torch.float64), keys[mask])
    accumulate_moment(transposed, keys.T.contiguous().T)
    # within the bound, not bit for bit: the library's products of float64 keys depend on the layout
    assert_is_moment(transposed.lower, torch.zeros(51, 51, dtype=torch.float64), keys)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", [(65, 49), (1, 1), (7, 96), (3, 383)], ids=str)
def test_reads_nothing_beyond_the_keys(
    level: str, dtype: torch.dtype, shape: tuple[int, int], before_unreadable_page: Callable[[Tensor], Tensor]
) -> None:
    keys = before_unreadable_page(random_keys(*shape, dtype=dtype))
    total = MomentSum(before_unreadable_page(torch.zeros(shape[1], shape[1], dtype=torch.float64)))
    accumulate_moment(total, keys)
    assert_is_moment(total.lower, torch.zeros_like(total.lower), keys)


def test_the_upper_triangle_is_left_alone(level: str) -> None:
    if level == "reference":
        pytest.skip("needs the native module: plain torch adds zeros there")
    total = MomentSum(torch.full((100, 100), torch.nan, dtype=torch.float64).triu(1))
    accumulate_moment(total, random_keys(5, 100))
    assert torch.isnan(total.lower[torch.ones(100, 100).triu(1).bool()]).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(1, 90), cut=st.integers(0, 90))
def test_order_and_cuts_of_the_tokens_change_rounding_only(seed: int, n: int, cut: int) -> None:
    keys = random_keys(n, 7, seed=seed)
    whole = ops.accumulate_moment(MomentSum.zeros(7), keys)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert_is_moment(ops.accumulate_moment(MomentSum.zeros(7), keys[order]).lower, torch.zeros(7, 7).double(), keys)
    parts = [ops.accumulate_moment(MomentSum.zeros(7), part) for part in (keys[:cut], keys[cut:])]
    merged = parts[0].merge(parts[1])
    assert merged.count == whole.count
    assert_is_moment(merged.lower, torch.zeros(7, 7).double(), keys)


def test_subnormal_keys_count_as_zero_at_most_in_bf16_products(level: str) -> None:
    keys = torch.tensor([[1e-39, 1.0, 2.0]] * 3).bfloat16()
    lower = accumulate_moment(MomentSum.zeros(3), keys).lower.tril()
    want = reference.accumulate_moment(torch.zeros(3, 3), keys)
    assert torch.equal(lower[1:, 1:], want[1:, 1:])
    assert bool(((lower - want).abs() <= 3 * 2.0**-126 * 4).all())


def test_bf16_products_are_refused_where_there_are_none(level: str) -> None:
    with pytest.raises(BackendError, match=r"precision 'bf16' needs bfloat16 keys .* use precision='auto'"):
        ops.accumulate_moment(MomentSum.zeros(4), random_keys(3, 4), precision="bf16")
    if level != "avx512_bf16":
        with pytest.raises(BackendError, match="a processor with AVX-512 BF16"):
            ops.accumulate_moment(MomentSum.zeros(4), random_keys(3, 4).bfloat16(), precision="bf16")


def test_bits_do_not_depend_on_threads(level: str, threads: None) -> None:
    keys = random_keys(150, 400, dtype=torch.bfloat16)
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(accumulate_moment(MomentSum.zeros(400), keys).lower.tril())
    # plain torch promises no such thing for its products, native bodies do
    if level != "reference":
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-3)


def test_second_moment_is_symmetric_mean() -> None:
    keys = random_keys(40, 9, dtype=torch.float64)
    moment = accumulate_moment(MomentSum.zeros(9), keys).second_moment()
    assert torch.equal(moment, moment.T)
    torch.testing.assert_close(moment, keys.T @ keys / 40, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=3, max_size=3), st.integers(0, 2**31))
def test_merge_is_commutative_and_associative(sizes: list[int], seed: int) -> None:
    parts = [accumulate_moment(MomentSum.zeros(5), random_keys(n, 5, seed=seed + n)) for n in sizes]
    first, second, third = parts
    swapped = second.merge(first)
    assert torch.equal(first.merge(second).lower, swapped.lower)
    left, right = first.merge(second).merge(third), first.merge(second.merge(third))
    assert left.count == right.count == sum(sizes)
    scale = sum(part.lower.abs() for part in parts)
    assert bool(((left.lower - right.lower).abs() <= 4 * 2.0**-53 * scale).all())


def test_many_blocks_keep_their_digits(level: str) -> None:
    """A float32 running sum would lose the small keys beside the large ones: 2²⁵ + 1 = 2²⁵ in float32."""
    total = MomentSum.zeros(1)
    accumulate_moment(total, torch.full((1, 1), 2.0**12.5))
    for _ in range(10):
        accumulate_moment(total, torch.ones(1, 1))
    large = float(torch.full((1, 1), 2.0**12.5).square())
    assert float(total.lower) == large + 10


def test_round_trip_through_tensors() -> None:
    total = accumulate_moment(MomentSum.zeros(7), random_keys(20, 7))
    total.n_nonfinite = 3
    again = MomentSum.from_tensors(total.to_tensors())
    assert (again.count, again.n_nonfinite) == (20, 3)
    assert torch.equal(again.second_moment(), total.second_moment())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_keys(value: float, dtype: torch.dtype) -> None:
    keys = random_keys(BLOCK_ROWS + 40, 6, dtype=dtype)
    keys[BLOCK_ROWS + 30, 4] = value
    total = MomentSum.zeros(6)
    with pytest.raises(NonFiniteError, match=f"row {BLOCK_ROWS + 30}"):
        accumulate_moment(total, keys)
    assert total.count == 0
    assert not total.lower.any()
    accumulate_moment(total, keys, nonfinite="exclude")
    assert (total.count, total.n_nonfinite) == (BLOCK_ROWS + 39, 1)
    assert torch.isfinite(total.lower).all()
    mask = torch.arange(len(keys)) != BLOCK_ROWS + 30
    accumulate_moment(total, keys, mask=mask)
    with pytest.raises(NonFiniteError, match=f"row {BLOCK_ROWS + 30}"):
        accumulate_moment(total, keys, mask=torch.arange(len(keys)) > 7)


def test_no_tokens() -> None:
    total = accumulate_moment(MomentSum.zeros(4), torch.empty(0, 4))
    assert total.count == 0
    with pytest.raises(SingularMomentError, match="over 0 tokens"):
        total.second_moment()


def test_profile_counts_half_the_product() -> None:
    with profile() as calls:
        accumulate_moment(MomentSum.zeros(10), random_keys(8, 10))
    assert calls[0].flops == 8 * 10 * 11


def test_opcheck() -> None:
    lower = torch.zeros(5, 5, dtype=torch.float64)
    torch.library.opcheck(torch.ops.rep_fast.accumulate_moment.default, (lower, random_keys(3, 5), "auto"))


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (torch.zeros(3, 5), {}, "keys are 5 wide, the sum is 4 wide"),
        (torch.zeros(4), {}, r"keys must be \(tokens, width\).*got \(4,\)"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "int64"),
        (torch.zeros(3, 4), {"mask": torch.ones(2, dtype=torch.bool)}, r"mask must be \(3,\) bool, got \(2,\)"),
        (torch.zeros(3, 4), {"mask": torch.ones(3)}, "bool, got .* torch.float32"),
        (torch.zeros(3, 4), {"nonfinite": "ignore"}, "'raise' or 'exclude', got 'ignore'"),
        (torch.zeros(3, 4), {"precision": "int8"}, "one of auto, fp32, bf16, got 'int8'"),
    ],
)
def test_errors(keys: Tensor, options: dict, message: str) -> None:
    with pytest.raises(HparamError, match=message):
        accumulate_moment(MomentSum.zeros(4), keys, **options)


def test_moment_sum_errors() -> None:
    with pytest.raises(HparamError, match="at least 1, got 0"):
        MomentSum.zeros(0)
    with pytest.raises(HparamError, match="key widths differ, 3 and 4"):
        MomentSum.zeros(3).merge(MomentSum.zeros(4))
    with pytest.raises(HparamError, match="needs the tensors lower and counts"):
        MomentSum.from_tensors({"lower": torch.zeros(2, 2)})
    with pytest.raises(HparamError, match=r"must be \(M, M\) float64"):
        MomentSum.from_tensors({"lower": torch.zeros(2, 3), "counts": torch.zeros(2)})
