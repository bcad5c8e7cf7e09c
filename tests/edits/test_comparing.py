"""Comparing edits: inner products against dense matrices, and what is told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rep_fast.edits import Delta, Dense, Edit, KeyAdapter, LowRank, ModuleEdit, Slices
from rep_fast.edits.comparing import compare, inner_product
from rep_fast.facts import Fact

ONE, TWO = Fact("{} is in", "Köln", "Asia"), Fact("{} is in", "Bonn", "Asia")


def deltas(seed: int) -> list[Delta]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        LowRank(draw(5, 2), draw(2, 7)),
        Slices(torch.tensor([3, 1]), draw(5, 2), "inputs", 7),
        Slices(torch.tensor([4]), draw(1, 7), "outputs", 5),
        Dense(draw(5, 7)),
    ]


def test_inner_products_are_those_of_the_matrices() -> None:
    for one in deltas(0):
        for two in deltas(1):
            expected = float((one.to_dense() * two.to_dense()).sum())
            assert inner_product(one, two) == pytest.approx(expected, rel=1e-12)


def test_an_edit_and_its_scaled_double() -> None:
    low_rank = deltas(0)[0]
    assert isinstance(low_rank, LowRank)
    adapter = KeyAdapter.initial(7, rank=2)
    first = Edit((ONE,), "rome", {"layer": 1, "lr": 0.5}, "f", (ModuleEdit(1, low_rank), ModuleEdit(0, low_rank)))
    second = replace(
        first, facts=(TWO,), hparams={"layer": 1, "lr": 1.0}, modules=(ModuleEdit(1, -2.0 * low_rank, (adapter,)),)
    )
    found = compare(first, second)
    assert found.same_model
    assert (found.only_first, found.only_second) == ((ONE,), (TWO,))
    assert found.hparams == {"lr": (0.5, 1.0)}
    lower, upper = found.modules
    assert (lower.place, lower.kinds, lower.cosine) == ((0, "down"), ("low_rank", None), None)
    assert upper.cosine == pytest.approx(-1.0)
    assert upper.norms[1] == pytest.approx(2 * upper.norms[0])
    assert upper.adapters == (0, 1)
    same = compare(first, first)
    assert (same.only_first, same.only_second, same.hparams) == ((), (), {})
    assert not compare(first, replace(first, fingerprint="g")).same_model
