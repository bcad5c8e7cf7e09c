"""Slices and dense deltas: the algebra against dense matrices, at any linear module, on disk, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rep_fast.edits import Delta, Dense, Edit, KeyAdapter, LowRank, ModuleEdit, Slices
from rep_fast.edits.kinds import KINDS
from rep_fast.errors import HparamError, LayerError, NonFiniteError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
TEXT = "Slovenia belongs to the continent of"
FAMILIES = ("llama", "gptj", "gpt2")


def random_slices(outputs: int, inputs: int, count: int, axis: Any, seed: int) -> Slices:
    generator = torch.Generator().manual_seed(seed)
    size = outputs if axis == "outputs" else inputs
    index = torch.randperm(size, generator=generator)[:count]
    shape = (len(index), inputs) if axis == "outputs" else (outputs, len(index))
    return Slices(index, torch.randn(shape, generator=generator, dtype=torch.float64), axis, size)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 9), st.integers(0, 5), st.sampled_from(["outputs", "inputs"]), st.integers(0, 9)
)
def test_slices_are_their_dense_matrix(outputs: int, inputs: int, count: int, axis: str, seed: int) -> None:
    delta = random_slices(outputs, inputs, count, axis, seed)
    dense = torch.zeros(outputs, inputs, dtype=torch.float64)
    for number, position in enumerate(delta.index.tolist()):
        if axis == "outputs":
            dense[position] = delta.values[number]
        else:
            dense[:, position] = delta.values[:, number]
    rows = torch.randn(3, 2, inputs, dtype=torch.float64)
    assert delta.shape == (outputs, inputs)
    close(delta.to_dense(), dense)
    close(delta.on_rows(rows), rows @ dense.T)


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_a_sum_of_slices_is_the_sum_of_their_matrices(axis: Any) -> None:
    deltas = [random_slices(5, 7, count, axis, seed) for seed, count in enumerate((3, 0, 4, 5))]
    total = Slices.concat(deltas)
    close(total.to_dense(), sum(delta.to_dense() for delta in deltas))
    assert total.index.tolist() == sorted({node for delta in deltas for node in delta.index.tolist()})
    with pytest.raises(LayerError, match="needs at least one"):
        Slices.concat([])
    for other in (
        random_slices(5, 7, 2, "inputs" if axis == "outputs" else "outputs", 9),
        random_slices(6, 8, 2, axis, 9),
    ):
        with pytest.raises(LayerError, match="cannot be added"):
            Slices.concat([deltas[0], other])


def test_stacked_slices_are_one_term_and_come_apart_again(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    outputs, inputs = lm.linear_shape(1, "up")
    kinds = [
        random_slices(outputs, inputs, 3, axis, seed) for seed, axis in enumerate(["outputs", "inputs", "outputs"])
    ]
    edits = [Edit((FACT,), "x", {}, lm.fingerprint, (ModuleEdit(1, delta, linear="up"),)) for delta in kinds]
    with edits[0].applied(lm):
        alone = lm.logits([TEXT])
    handles = [edit.apply(lm) for edit in edits]
    stacked = lm.logits([TEXT])
    weight = lm.linear_weight(1, "up")
    with torch.no_grad():
        kept = weight.clone()
        weight.add_(sum(delta.to_dense() for delta in kinds))
    for handle in handles:
        handle.undo()
    close(stacked, lm.logits([TEXT]))
    with torch.no_grad():
        weight.copy_(kept)
    with edits[0].applied(lm):
        assert torch.equal(lm.logits([TEXT]), alone)


@pytest.mark.parametrize("mode", ["hook", "merge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_linear_module_takes_any_kind(build_lm: Callable[..., EditableLM], family: str, mode: Any) -> None:
    lm = build_lm(family, dtype=torch.float64)
    clean = lm.logits([TEXT])
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    for number, linear in enumerate(lm.linears):
        outputs, inputs = lm.linear_shape(1, linear)
        generator = torch.Generator().manual_seed(number)
        kinds: list[Delta] = [
            random_slices(outputs, inputs, 3, "outputs", number),
            random_slices(outputs, inputs, 2, "inputs", number),
            Dense(torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)),
        ]
        for delta in kinds:
            edit = Edit((FACT,), "x", {}, lm.fingerprint, (ModuleEdit(1, delta, linear=linear),))
            with edit.applied(lm, mode):
                changed = lm.logits([TEXT])
            weight = lm.linear_weight(1, linear)
            kept = weight.clone()
            with torch.no_grad():
                weight.add_(delta.to_dense())
                expected = lm.logits([TEXT])
                weight.copy_(kept)
            close(changed, expected)
            assert not torch.allclose(changed, clean, atol=1e-6)
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_stacked_matrices_act_as_their_sum(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    deltas = [Dense(torch.randn(lm.linear_shape(1, "down"), generator=generator).double()) for _ in range(3)]
    edits = [Edit((FACT,), "x", {}, lm.fingerprint, (ModuleEdit(1, delta),)) for delta in deltas]
    handles = [edit.apply(lm) for edit in edits]
    stacked = lm.logits([TEXT])
    for handle in handles:
        handle.undo()
    total = Dense(deltas[0].matrix + deltas[1].matrix + deltas[2].matrix)
    with Edit((FACT,), "x", {}, lm.fingerprint, (ModuleEdit(1, total),)).applied(lm):
        close(stacked, lm.logits([TEXT]))


def test_a_matrix_in_training_is_read_anew_by_every_forward(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    leaf = torch.zeros(lm.linear_shape(1, "down"), dtype=torch.float64, requires_grad=True)
    still = Dense(torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).double())
    edits = [Edit((FACT,), "x", {}, lm.fingerprint, (ModuleEdit(1, delta),)) for delta in (still, Dense(leaf))]
    with edits[0].applied(lm), edits[1].applied(lm):
        before = lm.logits([TEXT])
        with torch.no_grad():
            leaf.add_(1.0)
        assert not torch.allclose(lm.logits([TEXT]), before)
        (gradient,) = torch.autograd.grad(lm.logits([TEXT]).sum(), [leaf])
    assert bool(gradient.abs().sum() > 0)


def test_every_kind_and_the_vectors_survive_the_file(tmp_path: Path) -> None:
    modules = (
        ModuleEdit(0, random_slices(4, 6, 2, "outputs", 0), linear="up", vectors={"past_keys": torch.randn(2, 6)}),
        ModuleEdit(0, random_slices(4, 6, 2, "inputs", 1), vectors={"k_star": torch.randn(6)}),
        ModuleEdit(1, Dense(torch.randn(4, 6, dtype=torch.float64))),
    )
    Edit((FACT,), "x", {}, "f" * 64, modules).save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert loaded.layers == (0, 1)
    for mine, theirs in zip(modules, loaded.modules, strict=True):
        assert mine.place == theirs.place
        assert mine.delta is not None
        assert theirs.delta is not None
        assert type(mine.delta) is type(theirs.delta)
        assert torch.equal(mine.delta.to_dense(), theirs.delta.to_dense())
        assert mine.vectors.keys() == theirs.vectors.keys()
        assert all(torch.equal(mine.vectors[name], theirs.vectors[name]) for name in mine.vectors)


def test_what_has_the_wanted_dtype_already_is_not_made_again() -> None:
    """A stack of edits is put together anew with each further one: reading every matrix for NaN would be its cost."""
    matrix = torch.ones(3, 4)
    for change in (Dense(matrix), LowRank(matrix, matrix.T), KeyAdapter.initial(4, rank=2)):
        assert change.to(device="cpu", dtype=torch.float32) is change
        assert change.to(dtype=torch.float64) is not change


def test_files_know_every_kind() -> None:
    assert all(name == kind.kind for name, kind in KINDS.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([0, 0]), torch.zeros(2, 3), "outputs", 4), "repeat an index"),
        ((torch.tensor([4]), torch.zeros(1, 3), "outputs", 4), "slice 4 lies outside the 4 outputs"),
        ((torch.tensor([1]), torch.zeros(2, 3), "outputs", 4), r"values with 1 of them, got \(1,\)"),
        ((torch.tensor([1.0]), torch.zeros(1, 3), "outputs", 4), "int64"),
        ((torch.tensor([1]), torch.zeros(1, 3), "rows", 4), "not 'rows'"),
        ((torch.tensor([1]), torch.zeros(1, 3, dtype=torch.int64), "outputs", 4), "floating values"),
    ],
)
def test_slices_that_fit_nothing(arguments: Any, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        Slices(*arguments)


def test_values_that_are_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="row 0 of the slices"):
        Slices(torch.tensor([1]), torch.full((1, 3), torch.nan), "outputs", 4)
    with pytest.raises(NonFiniteError, match="row 1 of the delta"):
        Dense(torch.tensor([[0.0], [torch.inf]]))
    with pytest.raises(LayerError, match="floating-point matrix"):
        Dense(torch.zeros(2, 2, dtype=torch.int64))


def test_a_linear_the_family_lacks(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("gpt2")
    for linear, message in (("q", "no linear 'q'; choose from down, up, attn_out, qkv"), ("gate", "has no gate")):
        edit = Edit((FACT,), "x", {}, lm.fingerprint, (ModuleEdit(1, Dense(torch.zeros(2, 2)), linear=linear),))
        with pytest.raises(LayerError, match=message):
            edit.apply(lm)


def test_adapters_belong_before_the_down_projection() -> None:
    with pytest.raises(LayerError, match="not before 'up'"):
        ModuleEdit(1, None, (KeyAdapter.initial(4),), linear="up")


def open_adapter(width: int, seed: int) -> KeyAdapter:
    start = KeyAdapter.initial(width, rank=2, gate_hidden=3, seed=seed, tau=0.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return KeyAdapter(
        start.weights._replace(b=torch.randn(width, 2, generator=generator, dtype=torch.float64)), tau=0.0
    )


def test_adapters_of_stacked_edits_compose_as_asked(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    one, two = open_adapter(lm.key_width(1), 1), open_adapter(lm.key_width(1), 2)
    edits = [Edit((FACT,), "x", {}, lm.fingerprint, (ModuleEdit(1, None, (adapter,)),)) for adapter in (one, two)]
    native = lm.keys([TEXT], 1)[1]
    with edits[0].applied(lm, compose="sum"), edits[1].applied(lm, compose="sum"):
        close(lm.keys([TEXT], 1)[1], one(native) + two(native) - native)
    with edits[0].applied(lm), edits[1].applied(lm):
        close(lm.keys([TEXT], 1)[1], two(one(native)))
    with (
        edits[0].applied(lm, compose="sum"),
        pytest.raises(HparamError, match="by 'sum'; apply this one with the same"),
    ):
        edits[1].apply(lm)
    with pytest.raises(HparamError, match="composition 'mix' is unknown"):
        edits[0].apply(lm, compose="mix")  # type: ignore[arg-type]
    assert lm.active_edits == []
