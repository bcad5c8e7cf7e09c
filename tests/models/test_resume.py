"""Resumed forwards equal full forwards with a patch at the value site (T-v-prefix-cache)."""

from __future__ import annotations

import pytest
import torch

from rep_fast.models import Batch, Site

ROWS = [[5, 9, 12, 40, 41, 8, 3], [7, 7, 20], [30, 31, 32, 33, 34], [11]]
STARTS = [2, 0, 4, 0]
AT = [[2, 5, 6], [2], [4], [0]]


def full_logits(lm, batch, layer, delta, at):
    rows = torch.arange(batch.n_rows)

    def add(value):
        changed = value.clone()
        changed[rows, torch.tensor(STARTS)] += delta
        return changed

    with lm.patch(Site("value", layer), add):
        return lm.logits(batch, at=at)


def moved(state, delta):
    hidden = state.hidden.clone()
    hidden[:, 0] += delta
    return hidden


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_resume_equals_full_forward(family, build_lm, layer, attention):
    if family == "gptj" and attention == "sdpa":
        attention = "eager"  # GPT-J has no sdpa path
    lm = build_lm(family, dtype=torch.float64, attention=attention)
    batch = Batch.from_rows(ROWS)
    generator = torch.Generator().manual_seed(layer)
    delta = torch.randn(batch.n_rows, lm.hidden_size, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, lm.vocab_size, generator=generator, dtype=torch.float64)
    expected = full_logits(lm, batch, layer, delta, AT)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), delta)
    state = lm.suffix_state(batch, layer, STARTS)
    found = lm.resume(state, moved(state, delta), at=AT)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(delta.grad, expected_gradient, rtol=1e-9, atol=1e-9)
