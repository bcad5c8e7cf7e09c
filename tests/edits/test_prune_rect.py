"""PRUNE and RECT (methods §5.11, §5.12) against their dense definitions, and edits accumulated into one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rep_fast.edits import Delta, Dense, Edit, KeyAdapter, LowRank, ModuleEdit, Slices, accumulate, prune, rect
from rep_fast.edits.prune import spectral_norm
from rep_fast.edits.rect import relatively_largest
from rep_fast.errors import FingerprintError, HparamError, LayerError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
FAMILIES = ("llama", "gpt2")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def delta_of(kind: str, shape: tuple[int, int], size: float) -> Delta:
    outputs, inputs = shape
    if kind == "low_rank":
        return LowRank(size * normal(outputs, 4), normal(4, inputs, seed=1))
    if kind == "dense":
        return Dense(size * normal(outputs, inputs))
    if kind == "rows":
        return Slices(torch.tensor([3, 1]), size * normal(2, inputs), "outputs", outputs)
    return Slices(torch.tensor([2, 0, 5]), size * normal(outputs, 3), "inputs", inputs)


def edit_of(lm: EditableLM, *modules: ModuleEdit) -> Edit:
    return Edit((FACT,), "x", {"layer": 1}, lm.fingerprint, modules, notes={"loss": 0.5})


@pytest.mark.parametrize("base", [math.e, 1.2])
@pytest.mark.parametrize("kind", ["low_rank", "dense", "rows", "columns"])
@pytest.mark.parametrize("family", FAMILIES)
def test_singular_values_above_the_weight_s_are_bounded(
    build_lm: Callable[..., EditableLM], family: str, kind: str, base: float
) -> None:
    """T-prune: against the SVD of the dense update, and ‖W' − W_0‖₂ by the closed formula."""
    lm = build_lm(family, dtype=torch.float64)
    weight = lm.down_weight(1).detach()
    sigma = float(torch.linalg.svdvals(weight)[0])
    delta = delta_of(kind, lm.linear_shape(1, "down"), 1.0)
    # the largest values lie above σ, the smallest of a dense update below it
    delta = delta_of(kind, lm.linear_shape(1, "down"), 3 * sigma / float(torch.linalg.svdvals(delta.to_dense())[0]))
    u, values, vh = torch.linalg.svd(delta.to_dense(), full_matrices=False)
    bounded = [s if s <= sigma else sigma + math.log(s, base) - math.log(sigma, base) for s in values.tolist()]
    expected = u @ torch.diag(torch.tensor(bounded, dtype=torch.float64)) @ vh
    edit = prune(edit_of(lm, ModuleEdit(1, delta, vectors={"k_star": normal(3)})), lm, base=base)
    found = edit.module(1).delta
    assert type(found) is type(delta)
    assert edit.module(1).vectors == {}
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-9, atol=1e-9)
    norm = float(torch.linalg.svdvals(found.to_dense())[0])
    assert norm == pytest.approx(sigma + math.log(values[0].item() / sigma, base), rel=1e-9)
    assert edit.notes["loss"] == 0.5
    report = edit.notes["prune"]["modules"][0]
    assert report["limit"] == pytest.approx(sigma, rel=1e-9)
    assert report["largest"] == pytest.approx(values[0].item(), rel=1e-9)


@pytest.mark.parametrize("rank", [9, 40])
def test_more_updates_than_a_side_has_directions(tiny_llama64: EditableLM, rank: int) -> None:
    """Accumulated edits: the factors have more columns than the smaller side, then than both."""
    lm = tiny_llama64
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = lm.linear_shape(1, "down")
    rank += outputs if rank < 40 else inputs
    left, right = (torch.randn(*s, generator=generator).double() for s in ((outputs, rank), (rank, inputs)))
    module = ModuleEdit(1, LowRank(left, right), vectors={"past_keys": right[:2], "k_star": right[0]})
    edit = Edit((), "x", {}, lm.fingerprint, (module,), model_name=lm.name)
    pruned = prune(edit, lm).modules[0]
    assert pruned.delta is not None
    limit = float(torch.linalg.matrix_norm(lm.linear_weight(1, "down").detach(), 2))
    largest = float(torch.linalg.matrix_norm(left @ right, 2))
    found = float(torch.linalg.matrix_norm(pruned.delta.to_dense(), 2))
    assert found == pytest.approx(limit + math.log(largest) - math.log(limit), rel=1e-9)
    assert list(pruned.vectors) == ["past_keys"]


@pytest.mark.parametrize("kind", ["low_rank", "dense", "columns"])
def test_an_update_below_the_limit_is_left_alone(tiny_llama64: EditableLM, kind: str) -> None:
    adapter = KeyAdapter.initial(tiny_llama64.key_width(2), rank=1, gate_hidden=2)
    edit = edit_of(
        tiny_llama64,
        ModuleEdit(1, delta_of(kind, tiny_llama64.linear_shape(1, "down"), 1e-3)),
        ModuleEdit(2, None, (adapter,)),
    )
    assert prune(edit, tiny_llama64).modules == edit.modules


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 4)])
def test_the_spectral_norm(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    assert spectral_norm(matrix) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-12)


@pytest.mark.parametrize("share", [0.2, 0.4, 1.0, 1e-6])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_relatively_largest_entries_stay(build_lm: Callable[..., EditableLM], family: str, share: float) -> None:
    """T-rect: the kept share, exact equality on kept entries, zero elsewhere."""
    lm = build_lm(family, dtype=torch.float64)
    for delta in (delta_of("low_rank", lm.linear_shape(1, "down"), 1.0), Dense(normal(*lm.linear_shape(1, "down")))):
        before = delta.to_dense()
        edit = rect(edit_of(lm, ModuleEdit(1, delta)), lm, share=share)
        after = edit.module(1).delta.to_dense()
        kept = after != 0
        count = max(1, round(share * before.numel()))
        assert int(kept.sum()) == count
        assert torch.equal(after[kept], before[kept])
        ratio = (before / lm.down_weight(1)).abs()
        order = ratio.flatten().sort(descending=True).values
        assert torch.equal(ratio[kept].min(), order[count - 1])


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 1), st.integers(0, 99))
def test_selection_with_ties_and_zeros(outputs: int, inputs: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    change, weight = (torch.randint(-1, 2, (outputs, inputs), generator=generator).double() for _ in range(2))
    kept = relatively_largest(change, weight, share=share)
    assert int(kept.sum()) == max(1, round(share * change.numel()))
    # a change of a zero weight comes first, no change last
    rank = torch.where(change == 0, 0, torch.where(weight == 0, 2, 1))
    if bool((~kept).any()):
        assert int(rank[kept].min()) >= int(rank[~kept].max())


def test_epsilon_moves_the_weight(tiny_llama64: EditableLM) -> None:
    change = torch.ones(tiny_llama64.linear_shape(1, "down"), dtype=torch.float64)
    edit = edit_of(tiny_llama64, ModuleEdit(1, Dense(change)))
    for epsilon in (0.0, 0.5):
        kept = rect(edit, tiny_llama64, share=0.1, epsilon=epsilon).module(1).delta.to_dense() != 0
        near = (tiny_llama64.down_weight(1) + epsilon).abs()
        assert bool(near[kept].max() < near[~kept].min())


def test_refusals(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama")
    edit = edit_of(lm, ModuleEdit(1, Dense(torch.ones(lm.linear_shape(1, "down")))))
    with pytest.raises(HparamError, match=r"base=1\.0 of PRUNE"):
        prune(edit, lm, base=1.0)
    for share in (0.0, 1.5):
        with pytest.raises(HparamError, match=f"share={share} of RECT is out of range"):
            rect(edit, lm, share=share)
    with edit.applied(lm):
        for transform, name in ((prune, "PRUNE"), (rect, "RECT")):
            with pytest.raises(HparamError, match=f"{name} compares with the unedited weights; undo the 1 active"):
                transform(edit, lm)
    with pytest.raises(FingerprintError):
        prune(dataclasses.replace(edit, fingerprint="0" * 64), lm)
    with pytest.raises(FingerprintError):
        rect(dataclasses.replace(edit, fingerprint="0" * 64), lm)


class Alien:
    kind = "alien"

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape


def test_a_delta_prune_does_not_know(tiny_llama: EditableLM) -> None:
    alien: Any = Alien(tiny_llama.linear_shape(1, "down"))
    with pytest.raises(LayerError, match="PRUNE knows low-rank deltas, slices and dense ones, not those of 'down'"):
        prune(edit_of(tiny_llama, ModuleEdit(1, alien)), tiny_llama)


@pytest.mark.parametrize("kinds", [("low_rank", "low_rank"), ("low_rank", "columns", "dense"), ("rows", "rows")])
def test_accumulated_edits_act_as_the_stack(build_lm: Callable[..., EditableLM], kinds: tuple[str, ...]) -> None:
    lm = build_lm("gpt2", dtype=torch.float64)
    shape = lm.linear_shape(1, "down")
    adapters = [KeyAdapter.initial(shape[1], rank=1, gate_hidden=2, seed=n, tau=0.0) for n in range(len(kinds))]
    adapters = [
        dataclasses.replace(a, weights=a.weights._replace(b=normal(shape[1], 1, seed=9).float())) for a in adapters
    ]
    edits = [
        edit_of(lm, ModuleEdit(1, delta_of(kind, shape, 0.1 + number), (adapter,)), ModuleEdit(number % 3, linear="up"))
        for number, (kind, adapter) in enumerate(zip(kinds, adapters, strict=True))
    ]
    handles = [edit.apply(lm) for edit in edits]
    expected = lm.logits([FACT.text])
    for handle in handles:
        handle.undo()
    together = accumulate(edits)
    with together.applied(lm):
        torch.testing.assert_close(lm.logits([FACT.text]), expected, rtol=1e-9, atol=1e-9)
    assert len(together.facts) == len(kinds)
    assert together.notes["accumulated"][0] == {"method": "x", "hparams": {"layer": 1}}
    wanted = LowRank if set(kinds) == {"low_rank"} else (Slices if "dense" not in kinds else Dense)
    assert isinstance(together.module(1).delta, wanted)


def test_what_cannot_be_accumulated(tiny_llama: EditableLM) -> None:
    edit = edit_of(tiny_llama)
    with pytest.raises(HparamError, match="no edits to accumulate"):
        accumulate([])
    with pytest.raises(FingerprintError, match=r"of another \(000000000000…\) cannot be accumulated"):
        accumulate([edit, dataclasses.replace(edit, fingerprint="0" * 64)])
