"""Adam on rows of trainable slices (methods §7.5).

"slices": every selection of nodes has moments of its own, dropped with it. "dense_parity": one Adam over everything, as
if the whole matrices were trained with masked gradients: rows selected earlier keep moving with their momentum, in
positive and negative steps alike. Rows that were never selected have no gradient and no momentum, so leaving them out
of the state changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rep_fast.editors.pac_slices import Place, Rows, TrainableSlices

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class RowAdam:
    """Kingma and Ba's update with torch's defaults for tensors [s, D] by module, whose rows may become more."""

    def __init__(self) -> None:
        self._moments: dict[Place, tuple[Tensor, Tensor]] = {}
        self._steps = 0

    def directions(self, gradients: Mapping[Place, Tensor]) -> dict[Place, Tensor]:
        """One step: what is to be subtracted, per unit of learning rate."""
        self._steps += 1
        found = {}
        for place, gradient in gradients.items():
            mean, square = self._grown(place, gradient)
            mean.lerp_(gradient, 1 - _BETA1)
            square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            root = square.sqrt().div_(math.sqrt(1 - _BETA2**self._steps)).add_(_EPSILON)
            found[place] = (mean / root).div_(1 - _BETA1**self._steps)
        return found

    def _grown(self, place: Place, like: Tensor) -> tuple[Tensor, Tensor]:
        old = self._moments.get(place, (like[:0], like[:0]))
        added = like.new_zeros(len(like) - len(old[0]), like.shape[1])
        if len(added) or place not in self._moments:
            self._moments[place] = (torch.cat([old[0], added]), torch.cat([old[1], added]))
        return self._moments[place]


def step_on_rows(
    slices: TrainableSlices, gradients: Mapping[Place, Tensor], rows: Rows, adam: RowAdam, rates: Mapping[Place, float]
) -> None:
    """Move these rows alone."""
    directions = adam.directions({place: gradients[place][own] for place, own in rows.items()})
    for place, own in rows.items():
        slices.values[place].index_add_(0, own, directions[place], alpha=-rates[place])


def step_on_all(
    slices: TrainableSlices, gradients: Mapping[Place, Tensor], rows: Rows, adam: RowAdam, rates: Mapping[Place, float]
) -> None:
    """Mask the gradients outside `rows` to zero and move everything that has momentum."""
    masked = {}
    for place, gradient in gradients.items():
        masked[place] = torch.zeros_like(gradient)
        if place in rows:
            masked[place][rows[place]] = gradient[rows[place]]
    for place, direction in adam.directions(masked).items():
        slices.values[place].sub_(direction, alpha=rates[place])
