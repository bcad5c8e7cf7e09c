"""Comparing edits: inner products against dense matrices, and what is told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rep_fast.edits import (
    Codebook,
    Delta,
    Dense,
    Edit,
    KeyAdapter,
    LowRank,
    MemoryRules,
    ModuleEdit,
    Replacement,
    SideMemory,
    Slices,
)
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


def replacing(replacement: Replacement, **others: Any) -> Edit:
    return Edit((ONE,), "grace", {}, "f", (ModuleEdit(1, linear="down", replacement=replacement, **others),))


def codebook(keys: torch.Tensor, values: torch.Tensor) -> Codebook:
    return Codebook(keys, values, ("Asia",) * len(keys), (1.0,) * len(keys))


def test_codebooks_are_compared_key_by_key() -> None:
    keys, values = torch.eye(7, dtype=torch.float64), torch.arange(1.0, 36.0, dtype=torch.float64).reshape(7, 5)
    whole, half, other = (
        codebook(keys[:2], values[:2]),
        codebook(keys[1:2], values[1:2]),
        codebook(keys[4:], values[4:]),
    )
    (found,) = compare(replacing(whole), replacing(half)).modules
    norms = (float(values[:2].norm()), float(values[1].norm()))
    assert (found.place, found.kinds, found.adapters) == ((1, "down"), ("codebook", "codebook"), (0, 0))
    assert found.norms == pytest.approx(norms)
    assert found.cosine == pytest.approx(norms[1] / norms[0])
    assert compare(replacing(whole), replacing(other)).modules[0].cosine == 0
    assert compare(replacing(whole), replacing(whole)).modules[0].cosine == pytest.approx(1)


def test_side_memories_are_compared_by_the_sum_of_their_changes() -> None:
    changes = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = SideMemory(changes, (1.0, 2.0), (1, 1), MemoryRules("silu"))
    one = SideMemory(-3 * changes.sum(dim=0)[None], (1.0,), (1,), MemoryRules("silu"))
    (found,) = compare(replacing(both), replacing(one)).modules
    assert found.cosine == pytest.approx(-1)
    assert found.norms == pytest.approx((float(changes.sum(dim=0).norm()), 3 * float(changes.sum(dim=0).norm())))
    book = codebook(torch.eye(7, dtype=torch.float64)[:1], torch.ones(1, 5, dtype=torch.float64))
    (found,) = compare(replacing(both), replacing(book)).modules
    assert (found.kinds, found.cosine) == (("side_memory", "codebook"), None)


def test_a_replacement_beside_a_delta_has_an_entry_of_its_own() -> None:
    book = codebook(torch.eye(7, dtype=torch.float64)[:1], torch.ones(1, 5, dtype=torch.float64))
    delta, replaced = compare(replacing(book, delta=deltas(0)[0]), replacing(book)).modules
    assert (delta.kinds, delta.cosine) == (("low_rank", None), None)
    assert (replaced.kinds, replaced.cosine) == (("codebook", "codebook"), pytest.approx(1))
