from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rep_fast.errors import HparamError, NonFiniteError, SingularMomentError
from rep_fast.ops import MomentSum, accumulate_moment, profile
from rep_fast.ops.accumulate_moment import BLOCK_ROWS
from rep_fast.reference import accumulate_moment as reference

pytestmark = pytest.mark.filterwarnings("ignore:accumulate_moment. the plain torch body serves")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# (tokens, width): ones, primes, beside the panel of 48 columns, the 192 of a task and the blocks of 64 and 1024 tokens
SHAPES = ((1, 1), (3, 47), (63, 48), (65, 49), (130, 191), (7, 193), (BLOCK_ROWS + 1, 13))


def random_keys(n: int, width: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_moment(lower: Tensor, before: Tensor, keys: Tensor) -> None:
    """Float32 products of at most BLOCK_ROWS tokens, float64 sums: γ_n = n·2⁻²⁴ per block, in units of Σ|k_i k_j|."""
    wide = keys.double().abs()
    depth = min(keys.shape[0], BLOCK_ROWS)
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
    assert torch.equal(transposed.lower.tril(), total.lower.tril())


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
    torch.library.opcheck(torch.ops.rep_fast.accumulate_moment.default, (lower, random_keys(3, 5)))


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (torch.zeros(3, 5), {}, "keys are 5 wide, the sum is 4 wide"),
        (torch.zeros(4), {}, r"keys must be \(tokens, width\).*got \(4,\)"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "int64"),
        (torch.zeros(3, 4), {"mask": torch.ones(2, dtype=torch.bool)}, r"mask must be \(3,\) bool, got \(2,\)"),
        (torch.zeros(3, 4), {"mask": torch.ones(3)}, "bool, got .* torch.float32"),
        (torch.zeros(3, 4), {"nonfinite": "ignore"}, "'raise' or 'exclude', got 'ignore'"),
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
