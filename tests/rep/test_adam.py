"""Adam on a flat tensor is torch's."""

from __future__ import annotations

import torch

from rep_fast.rep.adam import Adam


def test_updates_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(40, generator=generator, dtype=torch.float64)
    plain = weights.clone().requires_grad_()
    optimiser, ours = torch.optim.Adam([plain], lr=3e-2), Adam(weights, lr=3e-2)
    for step in range(30):
        gradient = torch.randn(40, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5 - 8)
        gradient[:4] = 0.0
        plain.grad = gradient.clone()
        optimiser.step()
        ours.step(gradient)
        torch.testing.assert_close(weights, plain.detach(), rtol=1e-12, atol=1e-14)
