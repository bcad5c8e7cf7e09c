"""Scores of many facts within a memory budget: the same as from all their traces at once."""

from __future__ import annotations

import pytest
import torch

from rep_fast.facts import Fact
from rep_fast.paths import gradient_sums, score_nodes, trace_answers
from rep_fast.paths.gradient_sums import gradient_column_scores
from rep_fast.reference import packed_scores as reference

FACTS = [
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean", "French"),
    Fact("The {} is located in the city of", "Eiffel Tower", "Los Angeles", "Paris"),
]


@pytest.mark.parametrize("score", ["zabs", "l2", "abs_sum"])
@pytest.mark.parametrize("k_node", ["up", "up+gate"])
def test_a_small_budget_changes_nothing(tiny_llama64, score, k_node):
    lm = tiny_llama64
    whole = score_nodes(lm, FACTS, score=score, k_node=k_node)
    pieces = score_nodes(lm, FACTS, score=score, k_node=k_node, memory_budget=1, token_budget=1)
    for ours, expected in ((pieces.key, whole.key), (pieces.value, whole.value)):
        assert float((ours - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-12)


@pytest.mark.parametrize(("layers_that_fit", "passes"), [(1, 3), (2, 2), (3, 1)])
def test_the_budget_bounds_the_layers_of_one_pass(tiny_llama64, monkeypatch, layers_that_fit, passes):
    lm, seen = tiny_llama64, []

    def spy(lm, answers, *, gate, layers):
        seen.append(tuple(layers))
        return trace_answers(lm, answers, gate=gate, layers=layers)

    monkeypatch.setattr(gradient_sums, "trace_answers", spy)
    per_layer = 2 * lm.hidden_size * lm.key_width(0) * 8
    answers = [lm.answer(fact.text, fact.target_new) for fact in FACTS]
    gradient_sums.summed_gradient_scores(
        lm, answers, score="l2", k_node="up", token_budget=4096, memory_budget=layers_that_fit * per_layer
    )
    assert len(seen) == passes
    assert [layer for layers in seen for layer in layers] == [0, 1, 2]
    assert max(map(len, seen)) == layers_that_fit


@pytest.mark.parametrize("score", ["zabs", "l2", "abs_sum"])
@pytest.mark.parametrize("shape", [(5, 7), (300, 11), (1, 1)])
def test_column_scores_follow_the_definition(score, shape):
    gradient = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradient[0] = 0.5  # a constant row has no deviation and contributes nothing
    expected = reference.packed_scores(torch.eye(len(gradient), dtype=torch.float64), gradient, score=score)[0]
    ours = gradient_column_scores(gradient, score)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_layers_of_a_trace(tiny_llama64):
    """A trace of some layers holds what the trace of all holds there."""
    lm = tiny_llama64
    answers = [lm.answer(fact.text, fact.target_new) for fact in FACTS]
    whole = trace_answers(lm, answers, gate=True, products=True)
    part = trace_answers(lm, answers, gate=True, products=True, layers=[1, 2])
    for kind in ("up", "gate", "down"):
        for ours, expected in zip(getattr(part, kind), getattr(whole, kind)[1:], strict=True):
            torch.testing.assert_close(ours.x, expected.x, rtol=1e-12, atol=0)
            torch.testing.assert_close(ours.g, expected.g, rtol=1e-9, atol=1e-15)
