"""Adam on rows of trainable slices (methods §7.5).

"slices": every selection of nodes has moments of its own, dropped with it. "dense_parity": one Adam over everything, as
if the whole matrices were trained with masked gradients: rows selected earlier keep moving with their momentum, in
positive and negative steps alike. Rows that were never selected have no gradient and no momentum, so leaving them out
of the state changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rep_fast.editors.adam import Adam, Skip
from rep_fast.editors.pac_slices import Place, Rows, TrainableSlices


class RowAdam(Adam[Place]):
    """`Adam` for tensors [s, D] by module."""

    def directions(self, gradients: Mapping[Place, Tensor], *, skip: Skip = False) -> dict[Place, Tensor]:
        """One step: what is to be subtracted, per unit of learning rate; zero where `skip` is set."""
        return {
            place: own.made((own.mean / own.root).div_(own.correction))
            for place, own in self.step(gradients, skip=skip).items()
        }


def step_on_rows(
    slices: TrainableSlices, gradients: Mapping[Place, Tensor], rows: Rows, adam: RowAdam,
    rates: Mapping[Place, float], *, skip: Skip = False,
) -> None:  # fmt: skip
    """Move these rows alone."""
    directions = adam.directions({place: gradients[place][own] for place, own in rows.items()}, skip=skip)
    for place, own in rows.items():
        slices.values[place].index_add_(0, own, directions[place], alpha=-rates[place])


def step_on_all(
    slices: TrainableSlices, gradients: Mapping[Place, Tensor], rows: Rows, adam: RowAdam,
    rates: Mapping[Place, float], *, skip: Skip = False,
) -> None:  # fmt: skip
    """Mask the gradients outside `rows` to zero and move everything that has momentum."""
    masked = {}
    for place, gradient in gradients.items():
        masked[place] = torch.zeros_like(gradient)
        if place in rows:
            masked[place][rows[place]] = gradient[rows[place]]
    for place, direction in adam.directions(masked, skip=skip).items():
        slices.values[place].sub_(direction, alpha=rates[place])
