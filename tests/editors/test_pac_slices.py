"""Trainable slices: their gradients are those of the whole weights at their places, and nothing else is ever made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rep_fast.editors.pac_slices import Place, TrainableSlices
from rep_fast.edits import Edit
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.paths import target_nll

FACTS = [
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe"),
    Fact("The {} is located in the city of", "Eiffel Tower", "Los Angeles", "Paris"),
]
NODES = ((1, 7, 30), (0, 47))  # of key and value modules, in layers 0 and 2


def places_of(lm: EditableLM) -> list[Place]:
    linears = ["up", *(["gate"] if lm.has_gate else []), "down"]
    return [(layer, linear) for layer in (0, 2) for linear in linears]


def with_random_slices(lm: EditableLM, *, size: float = 0.1) -> TrainableSlices:
    slices = TrainableSlices(lm, places_of(lm))
    slices.rows({place: NODES[place[1] == "down"] for place in places_of(lm)})
    generator = torch.Generator().manual_seed(0)
    for own in slices.values.values():
        own.copy_(size * torch.randn(own.shape, generator=generator, dtype=own.dtype))
    return slices


def full_gradients(lm: EditableLM, loss: Callable[[], torch.Tensor], places: list[Place]) -> dict[Place, torch.Tensor]:
    """Gradients of the whole weights [outputs, inputs] by ordinary autograd."""
    lm.model.requires_grad_(True)
    try:
        loss().backward()
        found = {}
        for place in places:
            module = lm.linear(*place)
            # Linear stores outputs × inputs, Conv1D inputs × outputs
            found[place] = (module.weight.grad if isinstance(module, nn.Linear) else module.weight.grad.T).clone()
        return found
    finally:
        lm.model.zero_grad(set_to_none=True)
        lm.model.requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2", "qwen3"])
def test_slice_gradients_are_the_masked_full_gradients(build_lm: Any, family: str) -> None:
    """T-slice-grad: gated and plain MLPs, Linear and Conv1D, at slices that are not zero, over a padded batch."""
    lm = build_lm(family, dtype=torch.float64)
    slices, places = with_random_slices(lm), places_of(lm)
    answers = [lm.answer(fact.text, fact.target_new) for fact in FACTS]
    with slices.in_forward(), slices.trainable():
        loss = target_nll(lm, answers).sum()
        ours = slices.gradients(loss)
    edit = Edit((FACTS[0],), "x", {}, lm.fingerprint, slices.modules())
    with edit.applied(lm, "merge"):
        whole = full_gradients(lm, lambda: target_nll(lm, answers).sum(), places)
        torch.testing.assert_close(target_nll(lm, answers).sum(), loss.detach(), rtol=1e-12, atol=0)
    for place in places:
        nodes = list(NODES[place[1] == "down"])
        expected = whole[place][:, nodes].T if place[1] == "down" else whole[place][nodes]
        assert ours[place].shape == (len(nodes), lm.hidden_size)
        assert float((ours[place] - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
        assert float(expected.abs().max()) > 0


@pytest.mark.parametrize("weights_require_grad", [False, True])
@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
def test_no_whole_gradient_is_ever_allocated(
    build_lm: Any, shapes_seen: Any, family: str, weights_require_grad: bool
) -> None:
    lm = build_lm(family)
    lm.model.requires_grad_(weights_require_grad)
    slices = with_random_slices(lm)
    answers = [lm.answer(fact.text, fact.target_new) for fact in FACTS]
    with shapes_seen() as seen, slices.in_forward(), slices.trainable():
        slices.gradients(target_nll(lm, answers).sum())
    d, m = lm.hidden_size, lm.key_width(0)
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert not {(d, m), (m, d)} & seen.shapes
    assert (len(NODES[0]), d) in seen.shapes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_sees_the_model_that_the_edit_makes(build_lm: Any, family: str, dtype: torch.dtype) -> None:
    lm = build_lm(family, dtype=dtype)
    slices = with_random_slices(lm, size=0.3)
    assert all(own.dtype == torch.promote_types(dtype, torch.float32) for own in slices.values.values())
    clean = lm.logits([FACTS[0].text]).detach()
    with slices.in_forward():
        trained = lm.logits([FACTS[0].text]).detach()
    edit = Edit((FACTS[0],), "x", {}, lm.fingerprint, slices.modules())
    with edit.applied(lm, "hook"):
        applied = lm.logits([FACTS[0].text]).detach()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(trained, applied, rtol=0, atol=16 * eps * float(applied.abs().max()))
    assert not torch.allclose(trained, clean, atol=16 * eps * float(clean.abs().max()))
    assert torch.equal(lm.logits([FACTS[0].text]).detach(), clean)


def test_nodes_join_with_zeros_and_keep_their_rows(tiny_llama64: EditableLM) -> None:
    slices = TrainableSlices(tiny_llama64, [(1, "up"), (1, "down")])
    first = slices.rows({(1, "up"): (5, 9), (1, "down"): ()})
    assert first[1, "up"].tolist() == [0, 1]
    assert (1, "down") not in first
    slices.values[1, "up"].fill_(1.0)
    second = slices.rows({(1, "up"): (2, 9)})
    assert second[1, "up"].tolist() == [2, 1]
    assert slices.values[1, "up"].sum(1).tolist() == [32.0, 32.0, 0.0]
    (module,) = slices.modules()
    assert module.place == (1, "up")
    assert module.delta is not None
    assert module.delta.index.tolist() == [2, 5, 9]
    assert module.delta.values.sum(1).tolist() == [0.0, 32.0, 32.0]
