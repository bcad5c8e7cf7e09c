"""Adam whose steps may turn out not to be made, which the device knows and the host does not (methods §5.8, §7.5).

An editor leaves a batch alone once its loss is small. Reading the loss would keep the device idle, so the step is
queued with a flag: where it is set, running means, count of steps and parameters stay what they were (`Course`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from rep_fast.models.transfer import sent

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
# rows of the first table of corrections; there are twice as many whenever they are used up
_TABLE_ROWS = 64

Name = TypeVar("Name", bound=Hashable)
# whether a step is not made: a flag [] on the device, or known beforehand to be
Skip = Tensor | Literal[False]


class Step(NamedTuple):
    """What one step makes of a parameter: it moves by −lr · mean / (root · correction), not at all where `skip` is set.

    mean, root: as the parameter. correction: a number, or [] float64.
    """

    mean: Tensor
    root: Tensor
    correction: float | Tensor
    skip: Skip

    def made(self, move: Tensor) -> Tensor:
        """A move of the parameter, zero where the step is skipped."""
        return move if self.skip is False else torch.where(self.skip, 0.0, move)


class Adam(Generic[Name]):
    """Kingma and Ba's update with torch's defaults for tensors [s, D] by name, whose rows may become more."""

    def __init__(self) -> None:
        self._moments: dict[Name, tuple[Tensor, Tensor]] = {}
        self._corrections = _Corrections()

    def step(self, gradients: Mapping[Name, Tensor], *, skip: Skip = False) -> dict[Name, Step]:
        """One step by these gradients, none where `skip` is set."""
        corrections = self._corrections.after(skip)
        found = {}
        for name, gradient in gradients.items():
            mean, square = self._grown(name, gradient)
            first, second_root = (_beside(own, gradient) for own in corrections)
            here = skip if skip is False else skip.to(gradient.device)
            before = (mean, square) if here is False else (mean.clone(), square.clone())
            mean.lerp_(gradient, 1 - _BETA1)
            square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            if here is not False:
                for now, old in zip((mean, square), before, strict=True):
                    now.copy_(torch.where(here, old, now))
            found[name] = Step(mean, square.sqrt().div_(second_root).add_(_EPSILON), first, here)
        return found

    def _grown(self, name: Name, like: Tensor) -> tuple[Tensor, Tensor]:
        old = self._moments.get(name, (like[:0], like[:0]))
        added = like.new_zeros(len(like) - len(old[0]), like.shape[1])
        if len(added) or name not in self._moments:
            self._moments[name] = (torch.cat([old[0], added]), torch.cat([old[1], added]))
        return self._moments[name]


class _Corrections:
    """1 − β1ᵗ and √(1 − β2ᵗ) of step after step, t counting those that are made.

    Once a step may be skipped t is known on the device alone, which looks the numbers up in a table made on the host:
    they are the same bits as there.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._skipped: Tensor | None = None
        self._table = torch.empty(0, 2, dtype=torch.float64)

    def after(self, skip: Skip) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """The corrections of the next step."""
        self._asked += 1
        if skip is not False:
            self._skipped = skip.long() if self._skipped is None else self._skipped + skip
        if self._skipped is None:
            return _corrections(self._asked)
        if self._asked >= len(self._table):
            n_rows = max(_TABLE_ROWS, 2 * self._asked)
            rows = torch.tensor([_corrections(t) for t in range(n_rows)], dtype=torch.float64)
            self._table = sent(rows, self._skipped.device)
        first, second_root = self._table.index_select(0, (self._asked - self._skipped).reshape(1))[0].unbind()
        return first, second_root


def _corrections(t: int) -> tuple[float, float]:
    return 1 - _BETA1**t, (1 - _BETA2**t) ** 0.5


def _beside(correction: float | Tensor, like: Tensor) -> float | Tensor:
    return correction.to(like.device) if isinstance(correction, Tensor) else correction
