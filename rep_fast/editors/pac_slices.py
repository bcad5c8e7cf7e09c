"""The rows and columns a path edit trains, as the only leaves of a backward pass (methods §7.5).

For key-nodes S of an up- or gate-projection y = xW and value-nodes S of the down-projection m = kW:

  y[:, S] += x ΔK_S        gradient xᵀ g[:, S]
  m       += k[:, S] ΔV_S  gradient k[:, S]ᵀ g_m

The terms are added beside the frozen weights, in float32 or wider whatever the model's dtype, just as the finished edit
is applied by hook; no gradient of a whole weight exists at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from rep_fast.edits import ModuleEdit, Slices
from rep_fast.models import Captured, EditableLM, Site
from rep_fast.models.transfer import sent

Place = tuple[int, str]  # layer, name of the linear module
Rows = Mapping[Place, Tensor]


class TrainableSlices:
    """ΔK and ΔV of some linear modules, one row per node, all zero at first.

    Args:
        places: modules that may be given nodes, "up" and "gate" for key-nodes, "down" for value-nodes.
    """

    def __init__(self, lm: EditableLM, places: Sequence[Place]) -> None:
        self._lm = lm
        self._nodes: dict[Place, dict[int, int]] = {place: {} for place in places}  # node → its row
        self._values = {place: self._no_rows(place) for place in places}
        self._index = {
            place: torch.empty(0, dtype=torch.int64, device=own.device) for place, own in self._values.items()
        }

    def _no_rows(self, place: Place) -> Tensor:
        outputs, inputs = self._lm.linear_shape(*place)
        stored = next(self._lm.linear(*place).parameters())
        dtype = torch.promote_types(stored.dtype, torch.float32) if stored.is_floating_point() else torch.float32
        return torch.empty(0, outputs if place[1] == "down" else inputs, dtype=dtype, device=stored.device)

    @property
    def values(self) -> Mapping[Place, Tensor]:
        """[s, D] per module: a row per node, in the order they joined."""
        return self._values

    def rows(self, nodes: Mapping[Place, Sequence[int]]) -> Rows:
        """The rows that belong to these nodes, [s] int64 per module; nodes that are new join with zeros."""
        return {place: self._rows_of(place, wanted) for place, wanted in nodes.items() if wanted}

    def _rows_of(self, place: Place, wanted: Sequence[int]) -> Tensor:
        known, values = self._nodes[place], self._values[place]
        for node in wanted:
            known.setdefault(node, len(known))
        self._values[place] = torch.cat([values, values.new_zeros(len(known) - len(values), values.shape[1])])
        self._index[place] = sent(torch.tensor(list(known), dtype=torch.int64), values.device)
        return sent(torch.tensor([known[node] for node in wanted], dtype=torch.int64), values.device)

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """Forward passes inside carry the slices, whatever they are at that moment."""
        inputs = {place: Site("key" if place[1] == "down" else "mlp_in", place[0]) for place in self._values}
        with ExitStack() as stack:
            seen = stack.enter_context(self._lm.capture(list(dict.fromkeys(inputs.values()))))
            for place, site in inputs.items():
                output = Site("value" if place[1] == "down" else place[1], place[0])
                stack.enter_context(self._lm.patch(output, self._adder(place, seen, site)))
            yield

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Losses computed inside have a gradient by the values."""
        held = [own for own in self._values.values() if len(own)]
        for own in held:
            own.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            for own in held:
                own.requires_grad_(False)

    def gradients(self, loss: Tensor) -> dict[Place, Tensor]:
        """Gradient of a loss made inside `trainable`, by the values of every module that has rows."""
        held = [place for place, own in self._values.items() if len(own)]
        # the slices alone are asked for: autograd forms no other weight's gradient
        return dict(zip(held, torch.autograd.grad(loss, [self._values[place] for place in held]), strict=True))

    def modules(self) -> tuple[ModuleEdit, ...]:
        """The slices as parts of an edit, nodes in ascending order."""
        return tuple(
            ModuleEdit(place[0], self._as_delta(place), linear=place[1])
            for place, own in self._values.items()
            if len(own)
        )

    def _as_delta(self, place: Place) -> Slices:
        index, order = self._index[place].sort()
        values = self._values[place][order]
        outputs, inputs = self._lm.linear_shape(*place)
        if place[1] == "down":
            return Slices(index, values.T.contiguous(), "inputs", inputs)
        return Slices(index, values, "outputs", outputs)

    def _adder(self, place: Place, seen: Captured, site: Site) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:
            values, index = self._values[place], self._index[place]
            if not len(values):
                return output
            read = seen[site]
            if place[1] == "down":
                moved = read.index_select(-1, index).to(values.dtype) @ values
                return (output.to(values.dtype) + moved).to(output.dtype)
            moved = output.index_select(-1, index).to(values.dtype) + read.to(values.dtype) @ values.T
            return output.index_copy(-1, index, moved.to(output.dtype))

        return add
