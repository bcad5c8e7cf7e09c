"""Whole rows in the middle of the model: run up to a layer, read there, go on later.

Editors of several layers write layer after layer, each from what the layers below say by then (methods §5.3). The
residual stream that enters the last written layer does not change any more, so a pass goes on from there instead of
from the embeddings, and ends where it is read. Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rep_fast.errors import LayerError
from rep_fast.models.batch import Batch
from rep_fast.models.families import BlockInputs, attention_window
from rep_fast.models.hooks import captured_at, first_tensor, run_until
from rep_fast.models.resume import PrefixCache, check_attention, mask_for, visible_tokens
from rep_fast.models.sites import Site

if TYPE_CHECKING:
    from rep_fast.models.editable_lm import EditableLM


@dataclass(frozen=True)
class RowState:
    """Rows on their way through the model.

    layer: the next one to run. hidden: [n, T, D], the residual stream entering it, pads included. batch: the rows.
    """

    layer: int
    hidden: Tensor
    batch: Batch


@torch.no_grad()
def enter_layer(lm: EditableLM, batch: Batch, layer: int) -> RowState:
    """Run rows from their tokens up to the input of `layer`.

    Raises:
        LayerError: no such layer, or an attention without explicit masks.
    """
    check_attention(lm)
    batch, block, site = batch.to(lm.device), lm.blocks[lm.check_layer(layer)], Site("hidden", layer - 1)
    with captured_at({site: (block, True)}) as seen:
        run_until(block, lambda: lm.run_base(batch), at_input=True)
    return RowState(layer, seen[site], batch)


@torch.no_grad()
def advance(lm: EditableLM, state: RowState, layer: int) -> RowState:
    """Go on to the input of `layer`; the model's hooks act, so edits of the layers in between are seen."""
    lm.check_layer(layer)
    return RowState(layer, _run(lm, state, layer), state.batch)


@torch.no_grad()
def read_rows(lm: EditableLM, state: RowState, sites: Sequence[tuple[str, int]]) -> Mapping[Site, Tensor]:
    """Sites of `state.layer` and above: site → [n, T, *]; nothing behind the deepest of them is run.

    Raises:
        LayerError: a site below the state's layer.
    """
    wanted = [Site(*site) for site in sites]
    for site in wanted:
        if site.layer < state.layer:
            raise LayerError(f"{site} lies below layer {state.layer}, which these rows have reached")
    module, at_input = lm._last_place(wanted)
    deepest = max(site.layer for site in wanted)
    with captured_at({site: lm._place(site) for site in wanted}) as seen:
        run_until(module, lambda: _run(lm, state, deepest + 1), at_input=at_input)
    return {site: seen[site] for site in wanted}


def _run(lm: EditableLM, state: RowState, end: int) -> Tensor:
    """The residual stream leaving layer end − 1."""
    if end < state.layer:
        raise LayerError(f"these rows have reached layer {state.layer}; enter layer {end} from their tokens")
    hidden, position_ids = state.hidden, state.batch.position_ids
    starts = torch.zeros_like(state.batch.lengths)
    rotary = lm.rotary(hidden, position_ids)
    empty = hidden.new_empty(len(hidden), 1, 0, 1)
    masks: dict[int | None, Tensor] = {}
    for layer in range(state.layer, end):
        window = attention_window(lm.config, layer)
        if window not in masks:
            masks[window] = mask_for(lm, visible_tokens(starts, hidden.shape[1], 0, window), hidden.dtype)
        inputs = BlockInputs(masks[window], position_ids, rotary, PrefixCache(empty, empty))
        hidden = first_tensor(lm.layout.run_block(lm.blocks[layer], hidden, inputs))
    return hidden
