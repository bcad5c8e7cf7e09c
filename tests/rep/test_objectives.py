"""The two objectives against their formulas, float64, no model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rep_fast.edits import KeyAdapter
from rep_fast.ops import AdapterWeights
from rep_fast.rep import RepHparams
from rep_fast.rep.calibrated_step import calibrated_step
from rep_fast.rep.objectives import calibrated_loss, paper_loss, protecting, soft_adapted

M, N = 24, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(seed: int = 1, *, zero_b: bool = False) -> AdapterWeights:
    weights = KeyAdapter.initial(M, rank=4, seed=seed, dtype=torch.float64).weights
    return weights if zero_b else weights._replace(b=normal(M, 4, seed=seed))


def leaves(weights: AdapterWeights) -> AdapterWeights:
    return AdapterWeights(*(part.clone().requires_grad_() for part in weights))


def test_an_untrained_adapter_moves_nothing_and_its_gate_gets_no_gradient() -> None:
    """T-rep-init: B = 0 ⇒ k̂ = k, L_cons = 0, and the paper's loss leaves the gate alone at step 1."""
    weights, keys, target = leaves(random_weights(zero_b=True)), normal(N, M), normal(M, seed=2)
    adapted, _ = soft_adapted(keys, weights)
    assert torch.equal(adapted, keys)
    loss = paper_loss(adapted, target, soft_adapted(keys[:1], weights)[0][0], keys[0], alpha=5e4)
    gradients = torch.autograd.grad(loss, [weights.w1, weights.b1, weights.w2, weights.b2, weights.b])
    assert all(bool((gradient == 0).all()) for gradient in gradients[:4])
    assert float(gradients[4].norm()) > 0


def test_target_of_unit_length_scales_the_papers_loss() -> None:
    """T-rep-target: with t = u the loss is the whitened one over ‖C⁻¹k*‖."""
    adapted, anchor, whitened = normal(N, M), normal(M, seed=3), 7.5 * normal(M, seed=2)
    as_printed = paper_loss(adapted, whitened, anchor, anchor, alpha=1.0)
    as_run = paper_loss(adapted, whitened / whitened.norm(), anchor, anchor, alpha=1.0)
    assert float(as_run) == pytest.approx(float(as_printed / whitened.norm()), rel=1e-12)


def test_paper_loss_by_hand() -> None:
    adapted, target = normal(N, M), normal(M, seed=2)
    moved, anchor = normal(M, seed=4), normal(M, seed=5)
    cosines = torch.stack([row @ target / row.norm() for row in adapted])
    wanted = -cosines.mean() + 3.0 * ((moved - anchor) ** 2).sum() / M
    assert float(paper_loss(adapted, target, moved, anchor, alpha=3.0)) == pytest.approx(float(wanted), rel=1e-12)
    absolute = paper_loss(adapted, target, anchor, anchor, alpha=3.0, absolute=True)
    assert float(absolute) == pytest.approx(-float(cosines.abs().mean()), rel=1e-12)


def test_calibrated_loss_by_hand() -> None:
    keys, response, weights = normal(N, M), normal(M, seed=2), random_weights()
    negatives, anchor = normal(5, M, seed=6), normal(M, seed=7)
    adapted, logits = soft_adapted(keys, weights)
    negative_logits = soft_adapted(negatives, weights)[1]
    moved = soft_adapted(anchor[None], weights)[0][0]
    found = calibrated_loss(
        adapted, keys, logits, negative_logits, moved, anchor, response,
        alpha=2.0, response_target=1.2, response_weight=1.5, shift_weight=0.3, negative_weight=0.7,
    )  # fmt: skip
    gate = torch.nn.functional.gelu(keys @ weights.w1.T + weights.b1) @ weights.w2 + weights.b2
    assert torch.allclose(gate, logits, rtol=1e-12, atol=1e-12)
    opened, shut = torch.sigmoid(logits), torch.sigmoid(negative_logits)
    by_hand = keys + opened[:, None] * (keys @ weights.a.T @ weights.b.T)
    wanted = (
        1.5 * ((1.2 - by_hand @ response) ** 2).mean()
        + 0.3 * (((by_hand - keys) ** 2).sum(1) / (keys**2).sum(1)).mean()
        + 2.0 * ((moved - anchor) ** 2).mean()
        - opened.log().mean()
        - 0.7 * (1 - shut).log().mean()
    )
    assert float(found) == pytest.approx(float(wanted), rel=1e-9)


def test_calibrated_loss_is_least_at_unit_response() -> None:
    """Overshooting costs as much as falling short, unlike in the paper's objective."""
    keys, response = normal(N, M), normal(M, seed=2)
    unit = keys + ((1 - keys @ response) / (response @ response))[:, None] * response
    logits = torch.zeros(N, dtype=torch.float64)
    options = {
        "alpha": 0.0,
        "response_target": 1.0,
        "response_weight": 1.0,
        "shift_weight": 0.0,
        "negative_weight": 0.0,
    }

    def loss(scale: float) -> float:
        return float(calibrated_loss(scale * unit, keys, logits, logits, keys[0], keys[0], response, **options))

    assert loss(1.0) < loss(0.8)
    assert loss(1.0) < loss(1.2)
    assert loss(0.8) == pytest.approx(loss(1.2), rel=1e-9)


@pytest.mark.parametrize("protected", [0, 3])
@pytest.mark.parametrize("n_negatives", [1, 5])
def test_the_written_out_gradient_is_that_of_the_definition(n_negatives: int, protected: int) -> None:
    """Loss and all six gradients, with keys entering A that are not the keys themselves (dropout, protected span)."""
    hparams = RepHparams(
        consistency=2.0, response_target=1.2, response_weight=1.5, shift_weight=0.3, negative_weight=0.7
    )
    weights, response = leaves(random_weights()), normal(M, seed=2)
    keys, negatives = normal(N + 1, M), normal(n_negatives, M, seed=6)
    entering = keys * (normal(N + 1, M, seed=8) > -0.5) / 0.7
    basis = torch.linalg.qr(normal(protected, M, seed=7).T).Q
    moved, logits = soft_adapted(keys, protecting(weights, basis), entering=entering)
    wanted = calibrated_loss(
        moved[:-1], keys[:-1], logits[:-1], soft_adapted(negatives, weights)[1], moved[-1], keys[-1], response,
        alpha=2.0, response_target=1.2, response_weight=1.5, shift_weight=0.3, negative_weight=0.7,
    )  # fmt: skip
    loss, gradients = calibrated_step(
        AdapterWeights(*(part.detach() for part in weights)),
        keys,
        negatives,
        response,
        hparams,
        entering=entering - (entering @ basis) @ basis.T,
    )
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-12)
    for found, expected in zip(gradients, torch.autograd.grad(wanted, list(weights)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("s", "n", "width", "rank"), [(1, 1, 1, 1), (7, 5, 33, 3), (42, 192, 512, 32), (50, 3, 97, 49)]
)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_the_native_step_is_the_written_out_one(
    monkeypatch: pytest.MonkeyPatch, isa: str, s: int, n: int, width: int, rank: int
) -> None:
    """float32 against float64: chains of width, s + n and rank additions through two layers."""
    monkeypatch.setenv("REP_FAST_ISA", isa)
    hparams = RepHparams(
        consistency=2.0, response_target=1.2, response_weight=1.5, shift_weight=0.3, negative_weight=0.7
    )
    hidden = max(1, width // 10)
    shapes = ((rank, width), (width, rank), (hidden, width), (hidden,), (hidden,), (1,))
    weights = AdapterWeights(*(normal(*shape, seed=i) * shape[-1] ** -0.5 for i, shape in enumerate(shapes)))
    keys, negatives, entering = normal(s + 1, width, seed=7), normal(n, width, seed=8), normal(s + 1, width, seed=9)
    response = normal(width, seed=10) * width**-0.5
    arguments = (AdapterWeights(*(part.float() for part in weights)), keys.float(), negatives.float(), response.float())
    narrow = calibrated_step(*arguments, hparams, entering=entering.float())
    wide = calibrated_step(weights, keys, negatives, response, hparams, entering=entering)
    bound = 4 * 2.0**-24 * (width + s + n + rank)
    assert float(narrow[0]) == pytest.approx(float(wide[0]), rel=bound)
    for found, wanted in zip(narrow[1], wide[1], strict=True):
        assert float((found.double() - wanted).norm()) <= bound * float(wanted.norm()) + 1e-7


def test_a_protecting_adapter_leaves_a_span_alone() -> None:
    """B A k = 0 for every k of the span and any B, while other keys still move."""
    weights, protected, keys = random_weights(), normal(3, M, seed=7), normal(N, M)
    held = protecting(weights, torch.linalg.qr(protected.T).Q)
    moved, _ = soft_adapted(protected, held)
    torch.testing.assert_close(moved, protected, rtol=1e-12, atol=1e-12)
    assert float((soft_adapted(keys, held)[0] - keys).norm()) > 1e-3
