"""Forward passes that start in the middle: layers above l, tokens from each row's lookup position on.

Everything below layer l, and every token before the lookup position, is constant while a value at (l, position) is
optimised (methods §3, "cheap exactness"). One forward without gradients keeps the residual stream leaving l from the
lookup position on and the attention keys and values of the tokens before it; each step then runs only the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rep_fast.errors import LayerError, PromptError
from rep_fast.models.batch import Batch
from rep_fast.models.families import BlockInputs, attention_window
from rep_fast.models.hooks import captured_at, first_tensor
from rep_fast.models.sites import Site

if TYPE_CHECKING:
    from rep_fast.models.editable_lm import EditableLM


# in place of a layer: the residual stream that enters layer 0
EMBEDDINGS = -1


@dataclass(frozen=True)
class SuffixState:
    """What `resume` needs, all of it without gradient.

    layer: l, or `EMBEDDINGS`. starts, lengths: [n] int64. hidden: [n, S, D] residual stream leaving l for tokens
    starts[j] …, zero where a row has fewer than S = max(lengths − starts) of them.
    """

    layer: int
    starts: Tensor
    lengths: Tensor
    hidden: Tensor
    bounds: tuple[tuple[int, int], ...] = field(repr=False)  # (start, length) of each row, known without a device copy
    inputs: tuple[BlockInputs, ...] = field(repr=False)  # of the layers above l
    weights: tuple[nn.Parameter, ...] = field(repr=False)  # of the layers above l, final norm and head

    @property
    def n_rows(self) -> int:
        return self.hidden.shape[0]

    def select(self, rows: Sequence[int]) -> SuffixState:
        """The state of the given rows alone, in the given order."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        masks: dict[int, Tensor] = {}  # layers share their masks, and go on sharing them

        def chosen(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index.to(tensor.device))

        def of_block(inputs: BlockInputs) -> BlockInputs:
            mask = masks.setdefault(id(inputs.mask), chosen(inputs.mask))
            rotary = None if inputs.rotary is None else (chosen(inputs.rotary[0]), chosen(inputs.rotary[1]))
            past = PrefixCache(chosen(inputs.past.keys), chosen(inputs.past.values))
            return BlockInputs(mask, chosen(inputs.position_ids), rotary, past)

        return replace(
            self, starts=chosen(self.starts), lengths=chosen(self.lengths), hidden=chosen(self.hidden),
            bounds=tuple(self.bounds[row] for row in rows), inputs=tuple(map(of_block, self.inputs)),
        )  # fmt: skip


class PrefixCache:
    """Attention keys and values of the tokens before the suffix; `update` joins, and never grows."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """[n, heads, P + S, d] for suffix keys and values [n, heads, S, d]."""
        if self.keys.shape[-2] == 0:
            return keys, values
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


def suffix_state(lm: EditableLM, batch: Batch, layer: int, starts: Sequence[int] | Tensor) -> SuffixState:
    """Run the whole batch once without gradient and keep what a resumed forward needs."""
    layer = layer if layer == EMBEDDINGS else lm.check_layer(layer)
    check_attention(lm)
    batch = batch.to(lm.device)
    starts = _checked_starts(batch, starts)
    residual = Site("hidden", layer)
    place = (lm.blocks[0], True) if layer == EMBEDDINGS else (lm.blocks[layer], False)
    cache = DynamicCache()  # without config: sliding layers too keep every token, the mask below hides the far ones
    with torch.no_grad(), captured_at({residual: place}) as seen:
        lm.run_base(batch, cache=cache)
        width = int((batch.lengths - starts).max())
        position_ids = starts[:, None] + torch.arange(width, device=starts.device)
        is_real = position_ids < batch.lengths[:, None]
        position_ids = position_ids.clamp(max=batch.input_ids.shape[1] - 1)
        full = seen[residual]
        rows = torch.arange(batch.n_rows, device=full.device)[:, None]
        hidden = full[rows, position_ids.to(full.device)] * is_real[..., None].to(full)
        inputs = _block_inputs(lm, layer, cache, starts, position_ids, hidden)
    bounds = tuple(zip(starts.tolist(), batch.lengths.tolist(), strict=True))
    above = [*lm.blocks[layer + 1 :], lm.final_norm, lm.head]
    weights = tuple(parameter for module in above for parameter in module.parameters())
    return SuffixState(layer, starts, batch.lengths, hidden, bounds, inputs, weights)


def resume(
    lm: EditableLM,
    state: SuffixState,
    hidden: Tensor,
    *,
    at: Sequence[Sequence[int]],
    read_layers: Sequence[int] | None = None,
) -> Tensor:
    """Logits [Σ, V] at absolute positions `at[j]` of each row, from `hidden` [n, S, D] leaving `state.layer`.

    read_layers: per row the layer whose residual stream final norm and head read; None: the last. Differentiable in
    `hidden`. The model's own weights are held fixed for the pass, so that `backward` never fills their `.grad`. Blocks
    are called as modules: edits' hooks in layers above `state.layer` act, those at or below it are part of the state
    already.
    """
    if hidden.shape != state.hidden.shape:
        raise LayerError(f"hidden has shape {tuple(hidden.shape)}, the state needs {tuple(state.hidden.shape)}")
    rows, columns = _suffix_index(state, at)
    read_at = _read_layers(lm, state, read_layers)[rows]
    pieces: list[Tensor] = []
    with _weights_fixed(state.weights):
        for layer in range(state.layer, int(read_at.max()) + 1):
            if layer > state.layer:
                inputs = state.inputs[layer - state.layer - 1]
                hidden = first_tensor(lm.layout.run_block(lm.blocks[layer], hidden, inputs))
            read = (read_at == layer).nonzero()[:, 0]
            if len(read):
                pieces.append(hidden[rows[read].to(hidden.device), columns[read].to(hidden.device)])
        # pieces lie by layer, the answer goes row by row
        order = torch.argsort(torch.argsort(read_at, stable=True)).to(hidden.device)
        joined = pieces[0] if len(pieces) == 1 else torch.cat([piece.to(hidden.device) for piece in pieces])[order]
        return lm.head(lm.final_norm(joined))


def _read_layers(lm: EditableLM, state: SuffixState, read_layers: Sequence[int] | None) -> Tensor:
    last = lm.n_layers - 1
    chosen = [last] * state.n_rows if read_layers is None else [lm.check_layer(layer) for layer in read_layers]
    if len(chosen) != state.n_rows:
        raise PromptError(f"layers to read were given for {len(chosen)} rows, the state has {state.n_rows}")
    if min(chosen) < state.layer:
        raise LayerError(f"layer {min(chosen)} lies below layer {state.layer}, from which this forward is resumed")
    return torch.tensor(chosen, dtype=torch.int64)


def _checked_starts(batch: Batch, starts: Sequence[int] | Tensor) -> Tensor:
    checked = torch.as_tensor(starts, dtype=torch.int64).to(batch.lengths.device)
    if checked.shape != batch.lengths.shape:
        raise PromptError(f"{checked.numel()} starts were given for {batch.n_rows} rows; give one per row")
    outside = ((checked < 0) | (checked >= batch.lengths)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise PromptError(f"start {int(checked[row])} of row {row} lies outside its {int(batch.lengths[row])} tokens")
    return checked


def _block_inputs(
    lm: EditableLM, layer: int, cache: DynamicCache, starts: Tensor, position_ids: Tensor, hidden: Tensor
) -> tuple[BlockInputs, ...]:
    n_prefix = int(starts.max())
    rotary = lm.rotary(hidden, position_ids)
    masks: dict[int | None, Tensor] = {}
    inputs = []
    for upper in range(layer + 1, lm.n_layers):
        window = attention_window(lm.config, upper)
        if window not in masks:
            visible = visible_tokens(starts, position_ids.shape[1], n_prefix, window)
            masks[window] = mask_for(lm, visible, hidden.dtype)
        stored: Any = cache.layers[upper]
        past = PrefixCache(stored.keys[:, :, :n_prefix].clone(), stored.values[:, :, :n_prefix].clone())
        inputs.append(BlockInputs(masks[window], position_ids, rotary, past))
    return tuple(inputs)


def visible_tokens(starts: Tensor, n_suffix: int, n_prefix: int, window: int | None) -> Tensor:
    """[n, 1, S, P + S] bool: which prefix slots (padded to P) and suffix slots each suffix token attends to.

    Suffix pads come after every real token of their row, so causality alone hides them.
    """
    device = starts.device
    suffix = torch.arange(n_suffix, device=device)
    prefix = torch.arange(n_prefix, device=device)
    queries = starts[:, None, None] + suffix[:, None]  # absolute positions [n, S, 1]
    past = (prefix < starts[:, None, None]).expand(-1, n_suffix, -1)  # [n, S, P]
    own = (suffix <= suffix[:, None]).expand(len(starts), -1, -1)  # [n, S, S]
    if window is not None:
        past = past & (queries - prefix < window)
        own = own & (suffix[:, None] - suffix < window)
    return torch.cat([past, own], dim=-1)[:, None]


def check_attention(lm: EditableLM) -> None:
    implementation = lm.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise LayerError(
            f"a resumed forward needs an explicit mask, which attention {implementation!r} does not take; "
            f"call model.set_attn_implementation('sdpa')"
        )


def mask_for(lm: EditableLM, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean for sdpa, additive for eager attention."""
    if lm.config._attn_implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


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


@contextmanager
def _weights_fixed(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """No parameter that wants a gradient gets one from graphs built inside."""
    trained = [parameter for parameter in weights if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
