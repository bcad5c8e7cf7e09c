"""Adam on rows against torch's, with rows that join later."""

from __future__ import annotations

import torch

from rep_fast.editors.pac_adam import RowAdam

PLACE = (0, "up")


def test_the_update_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    ours = theirs.detach().clone()
    optimiser, adam = torch.optim.Adam([theirs], lr=0.02), RowAdam()
    for _ in range(5):
        gradient = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        theirs.grad = gradient.clone()
        optimiser.step()
        ours -= 0.02 * adam.directions({PLACE: gradient})[PLACE]
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_rows_that_join_later_are_rows_without_gradient_until_then() -> None:
    generator = torch.Generator().manual_seed(1)
    whole, growing = RowAdam(), RowAdam()
    for step in range(6):
        gradient = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        gradient[2:] *= step >= 3
        n_rows = 4 if step >= 3 else 2
        expected = whole.directions({PLACE: gradient})[PLACE]
        found = growing.directions({PLACE: gradient[:n_rows]})[PLACE]
        torch.testing.assert_close(found, expected[:n_rows], rtol=1e-12, atol=1e-14)
