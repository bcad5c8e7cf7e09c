"""Forward passes that start in the middle: layers above l, tokens from each row's lookup position on.

Everything below layer l, and every token before the lookup position, is constant while a value at (l, position) is
optimised (methods §3, "cheap exactness"). One forward without gradients keeps the residual stream leaving l from the
lookup position on and the attention keys and values of the tokens before it; each step then runs only the rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
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
from rep_fast.models.read_plan import ReadPlan
from rep_fast.models.sites import Site
from rep_fast.models.transfer import sent

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
    plans: dict[Hashable, ReadPlan] = field(default_factory=dict, repr=False, compare=False)  # of earlier resumptions

    @property
    def n_rows(self) -> int:
        return self.hidden.shape[0]

    def read_plan(self, lm: EditableLM, at: Sequence[Sequence[int]], read_layers: Sequence[int] | None) -> ReadPlan:
        """See `ReadPlan.of`; kept, since a descent asks for the same tokens in every step."""
        asked = (tuple(map(tuple, at)), None if read_layers is None else tuple(read_layers))
        if asked not in self.plans:
            self.plans[asked] = ReadPlan.of(lm, self, at, read_layers)
        return self.plans[asked]

    def select(self, rows: Sequence[int]) -> SuffixState:
        """The state of the given rows alone, in the given order."""
        index = torch.tensor(list(rows), dtype=torch.int64)
        on_device: dict[torch.device, Tensor] = {}
        masks: dict[int, Tensor] = {}  # layers share their masks, and go on sharing them

        def chosen(tensor: Tensor) -> Tensor:
            if tensor.device not in on_device:
                on_device[tensor.device] = sent(index, tensor.device)
            return tensor.index_select(0, on_device[tensor.device])

        def of_block(inputs: BlockInputs) -> BlockInputs:
            mask = masks.setdefault(id(inputs.mask), chosen(inputs.mask))
            rotary = None if inputs.rotary is None else (chosen(inputs.rotary[0]), chosen(inputs.rotary[1]))
            past = PrefixCache(chosen(inputs.past.keys), chosen(inputs.past.values))
            return BlockInputs(mask, chosen(inputs.position_ids), rotary, past)

        return replace(
            self, starts=chosen(self.starts), lengths=chosen(self.lengths), hidden=chosen(self.hidden),
            bounds=tuple(self.bounds[row] for row in rows), inputs=tuple(map(of_block, self.inputs)), plans={},
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
    row_starts = _checked_starts(batch, starts)
    bounds = tuple(zip(row_starts, batch.row_lengths, strict=True))
    starts = sent(torch.tensor(row_starts), batch.lengths.device)
    residual = Site("hidden", layer)
    place = (lm.blocks[0], True) if layer == EMBEDDINGS else (lm.blocks[layer], False)
    cache = DynamicCache()  # without config: sliding layers too keep every token, the mask below hides the far ones
    with torch.no_grad(), captured_at({residual: place}) as seen:
        lm.run_base(batch, cache=cache)
        width = max(length - start for start, length in bounds)
        position_ids = starts[:, None] + torch.arange(width, device=starts.device)
        is_real = position_ids < batch.lengths[:, None]
        position_ids = position_ids.clamp(max=batch.input_ids.shape[1] - 1)
        full = seen[residual]
        rows = torch.arange(batch.n_rows, device=full.device)[:, None]
        hidden = full[rows, position_ids.to(full.device)] * is_real[..., None].to(full)
        inputs = _block_inputs(lm, layer, cache, starts, max(row_starts), position_ids, hidden)
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
    plan = state.read_plan(lm, at, read_layers)
    pieces: list[Tensor] = []
    with _weights_fixed(state.weights):
        for layer in range(state.layer, plan.deepest + 1):
            if layer > state.layer:
                inputs = state.inputs[layer - state.layer - 1]
                hidden = first_tensor(lm.layout.run_block(lm.blocks[layer], hidden, inputs))
            if layer in plan.tokens:
                pieces.append(hidden[plan.tokens[layer]])
        joined = pieces[0]
        if plan.order is not None:  # pieces lie by layer, the answer goes row by row
            joined = torch.cat([piece.to(hidden.device) for piece in pieces])[plan.order]
        return lm.head(lm.final_norm(joined))


def _checked_starts(batch: Batch, starts: Sequence[int] | Tensor) -> list[int]:
    checked: list[int] = torch.as_tensor(starts, dtype=torch.int64).tolist()
    if len(checked) != batch.n_rows:
        raise PromptError(f"{len(checked)} starts were given for {batch.n_rows} rows; give one per row")
    for row, (start, length) in enumerate(zip(checked, batch.row_lengths, strict=True)):
        if not 0 <= start < length:
            raise PromptError(f"start {start} of row {row} lies outside its {length} tokens")
    return checked


def _block_inputs(
    lm: EditableLM, layer: int, cache: DynamicCache, starts: Tensor, n_prefix: int, position_ids: Tensor, hidden: Tensor
) -> tuple[BlockInputs, ...]:
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
