"""Which tokens a resumed forward reads, and after which layer: worked out once, used in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rep_fast.errors import LayerError, PromptError
from rep_fast.models.transfer import sent

if TYPE_CHECKING:
    from rep_fast.models.editable_lm import EditableLM
    from rep_fast.models.resume import SuffixState


@dataclass(frozen=True)
class ReadPlan:
    """Index tensors on the devices of the layers they read, so that a step copies nothing from the host.

    tokens: layer → rows and suffix columns [·] read after it, layers ascending. order: [Σ] brings what was read layer
    by layer into the order row by row, on the deepest layer's device; None where one layer is read.
    """

    tokens: dict[int, tuple[Tensor, Tensor]]
    order: Tensor | None

    @classmethod
    def of(
        cls, lm: EditableLM, state: SuffixState, at: Sequence[Sequence[int]], read_layers: Sequence[int] | None
    ) -> ReadPlan:
        """The plan for absolute positions `at[j]` of each row.

        Raises: see `EditableLM.resume`.
        """
        rows, columns = _suffix_index(state, at)
        read_at = _read_layers(lm, state, read_layers)[rows]
        tokens = {}
        for layer in read_at.unique().tolist():
            here, device = read_at == layer, lm.layer_device(layer)
            tokens[layer] = (sent(rows[here], device), sent(columns[here], device))
        if len(tokens) == 1:
            return cls(tokens, None)
        order = torch.argsort(torch.argsort(read_at, stable=True))
        return cls(tokens, sent(order, lm.layer_device(max(tokens))))

    @property
    def deepest(self) -> int:
        """The last layer that is run."""
        return max(self.tokens)


def _read_layers(lm: EditableLM, state: SuffixState, read_layers: Sequence[int] | None) -> Tensor:
    last = lm.n_layers - 1
    chosen = [last] * state.n_rows if read_layers is None else [lm.check_layer(layer) for layer in read_layers]
    if len(chosen) != state.n_rows:
        raise PromptError(f"layers to read were given for {len(chosen)} rows, the state has {state.n_rows}")
    if min(chosen) < state.layer:
        raise LayerError(f"layer {min(chosen)} lies below layer {state.layer}, from which this forward is resumed")
    return torch.tensor(chosen, dtype=torch.int64)


def _suffix_index(state: SuffixState, at: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    if len(at) != len(state.bounds):
        raise PromptError(f"positions were given for {len(at)} rows, the state has {len(state.bounds)}")
    rows: list[int] = []
    columns: list[int] = []
    for row, (positions, (start, length)) in enumerate(zip(at, state.bounds, strict=True)):
        for position in positions:
            if not start <= position < length:
                raise PromptError(f"position {position} of row {row} lies outside its suffix {start}..{length - 1}")
            rows.append(row)
            columns.append(position - start)
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
