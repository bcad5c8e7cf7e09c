"""Algebra of low-rank deltas against their dense matrices, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rep_fast.edits import LowRank
from rep_fast.errors import LayerError, NonFiniteError

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))  # D, M, r, seed


def random_delta(d: int, m: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(d, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, m, generator=generator, dtype=torch.float64),
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(SIZES, st.integers(1, 3))
def test_algebra_agrees_with_dense_matrices(sizes: tuple[int, int, int, int], other_rank: int) -> None:
    d, m, rank, seed = sizes
    one, two = random_delta(d, m, rank, seed), random_delta(d, m, other_rank, seed + 1)
    dense, other = one.to_dense(), two.to_dense()
    keys = torch.randn(3, 2, m, dtype=torch.float64)
    assert (one.shape, one.rank) == ((d, m), rank)
    assert (one + two).rank == rank + other_rank
    close((one + two).to_dense(), dense + other)
    close((one - two).to_dense(), dense - other)
    close((-one).to_dense(), -dense)
    close((2.5 * one).to_dense(), 2.5 * dense)
    close((one * 2.5).to_dense(), 2.5 * dense)
    close(LowRank.concat([one, two, one]).to_dense(), 2 * dense + other)
    close(one @ keys[0].T, dense @ keys[0].T)
    close(one @ keys[0, 0], dense @ keys[0, 0])
    close(one.on_rows(keys), keys @ dense.T)
    close(one.norm(), dense.norm())
    close((one + two).norm(), (dense + other).norm())


def test_keys_of_another_dtype_are_widened() -> None:
    delta = random_delta(3, 4, 2, 0)
    keys = torch.randn(5, 4, dtype=torch.bfloat16)
    close(delta.on_rows(keys), keys.double() @ delta.to_dense().T)


def test_norm_of_cancelling_deltas_is_not_nan() -> None:
    delta = random_delta(5, 6, 3, 1)
    # the Gram form leaves the rounding error of two equal squares: √eps of the terms, never a root of a negative
    assert float((delta - delta).norm()) <= 1e-7 * float(delta.norm())


def test_to_changes_both_factors() -> None:
    delta = random_delta(3, 4, 2, 0).to(dtype=torch.float32)
    assert delta.left.dtype == delta.right.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LowRank(torch.zeros(3, 2), torch.zeros(3, 4)), "make no delta"),
        (lambda: LowRank(torch.zeros(3), torch.zeros(3, 4)), "make no delta"),
        (lambda: LowRank(torch.zeros(3, 2), torch.zeros(2, 4).double()), "must share one floating dtype"),
        (lambda: LowRank(torch.zeros(3, 2).long(), torch.zeros(2, 4).long()), "must share one floating dtype"),
        (lambda: LowRank.concat([]), "needs at least one"),
        (lambda: random_delta(3, 4, 1, 0) + random_delta(3, 5, 1, 0), r"\(3, 4\), \(3, 5\)"),
    ],
)
def test_factors_that_do_not_fit(build: Callable[[], LowRank], message: str) -> None:
    with pytest.raises(LayerError, match=message):
        build()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("side", "row"), [("left", 2), ("right", 1)])
def test_factors_with_nan_or_infinity_are_refused_with_the_row(value: float, side: str, row: int) -> None:
    factors = {"left": torch.zeros(3, 2), "right": torch.zeros(2, 4)}
    factors[side][row, 0] = value
    with pytest.raises(NonFiniteError, match=f"row {row} of the {side} factor"):
        LowRank(**factors)
