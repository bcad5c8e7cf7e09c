"""v* and z: the value that makes the model say the new target (methods §3).

A vector δ is added at a site of one layer, at the subject's last token, and optimised by Adam over the prompt behind
several prefixes, against a KL term that keeps "{subject} is a" where it was. The site is the MLP output (ROME: v*), the
residual stream leaving the layer (MEMIT: z), or attention and MLP outputs at once (PMET).

Exact savings, all with the same δ trajectory as the definition (`plain_value.py`): the layers up to the edit are
constant in δ and run once, which also gives the keys; the tokens before the subject's last one cannot see δ, so of
them only the attention keys and values are kept; the head is applied at the positions whose logits enter the loss;
several facts go through the layers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rep_fast.editors.answered import nothing_to_edit
from rep_fast.editors.value_descent import Descent, ValueHparams, descend
from rep_fast.editors.value_texts import GroupTexts, edit_texts
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site, SuffixState
from rep_fast.models.transfer import sent

# padded tokens that are optimised together: their activations in all layers above the edit are held for the gradient
VALUE_TOKENS = 4096
VALUE, HIDDEN = ("value",), ("hidden",)
ATTENTION_AND_VALUE = ("attn_out", "value")
SITES = (VALUE, HIDDEN, ATTENTION_AND_VALUE)


@dataclass(frozen=True)
class OptimisedValue:
    """What the optimisation found for one group of facts, at the (last) site.

    v_star, v_0: [D] optimised and original value of the bare prompt; keys [P, M], values [P, D]: key and value at the
    site of each prompt of the first fact at the subject's last token, unedited; losses: one per forward; deltas
    [steps, D] the trajectory of δ, for comparison with the plain definition; attention_deltas: likewise for PMET's
    second vector, which is not written, else None; answered: per fact of the group, whether the unedited model already
    answers its bare prompt with the new target.
    """

    v_star: Tensor
    v_0: Tensor
    keys: Tensor
    values: Tensor
    losses: tuple[float, ...]
    deltas: Tensor
    attention_deltas: Tensor | None = None
    answered: tuple[bool, ...] = (False,)

    @classmethod
    def of(cls, descent: Descent, keys: Tensor, values: Tensor) -> OptimisedValue:
        """From a descent and the unedited keys [P, M] and values [P, D]; float32 or wider."""
        deltas = descent.deltas[:, -1]
        keys, values = keys.to(torch.promote_types(keys.dtype, torch.float32)), values.to(deltas.dtype)
        return cls(
            values[0] + deltas[-1], values[0], keys, values, descent.losses, deltas,
            descent.deltas[:, 0] if descent.deltas.shape[1] > 1 else None, descent.answered,
        )  # fmt: skip


def optimise_value(
    lm: EditableLM, fact: Fact, *, layer: int, templates: Sequence[str], hparams: ValueHparams,
    sites: tuple[str, ...] = VALUE, fact_token: str = "subject_last", target_tok: str = "in_context",
) -> OptimisedValue:  # fmt: skip
    """The value for one fact; see `optimise_values`.

    Raises:
        NothingToEditError: the unedited model already answers the bare prompt with the new target.
    """
    (found,) = optimise_values(
        lm, [(fact,)], layer=layer, templates=templates, hparams=hparams, sites=sites, fact_token=fact_token,
        target_tok=target_tok,
    )  # fmt: skip
    return found


def optimise_values(
    lm: EditableLM, groups: Sequence[Sequence[Fact]], *, layer: int, templates: Sequence[str], hparams: ValueHparams,
    sites: tuple[str, ...] = VALUE, fact_token: str = "subject_last", target_tok: str = "in_context",
    max_tokens: int = VALUE_TOKENS,
) -> list[OptimisedValue]:  # fmt: skip
    """One value per group of facts, at `layer`.

    Args:
        groups: facts whose bare prompts have the same tokens up to the subject's last one; mostly one fact each.
        templates: context templates, the bare `{}` first (v_0 is taken from it).
        sites: one of `SITES`; the last one is the value that is returned.
        max_tokens: groups are optimised together up to this many padded tokens; the result does not depend on it.
    Raises:
        NothingToEditError: the unedited model already answers every fact's bare prompt with its new target.
        TokenizationError: see `edit_texts`. HparamError: unknown sites. LayerError: v_loss_layer below `layer`.
    Cost: one forward of all rows, then v_steps passes over the layers above `layer` and the tokens from the subject's
    last one on.
    """
    if sites not in SITES:
        raise HparamError(f"a value cannot be optimised at {sites}; choose from {', '.join(map(str, SITES))}")
    texts = [
        GroupTexts.of(
            group, [edit_texts(lm, fact, templates, fact_token=fact_token, target_tok=target_tok) for fact in group]
        )
        for group in groups
    ]
    found: dict[int, OptimisedValue] = {}
    for numbers in _chunks(texts, max_tokens):
        forward, keys, values = ResumedForward.start(lm, [texts[number] for number in numbers], layer, sites, hparams)
        v_0 = torch.stack([torch.stack([site[0] for site in of_group]) for of_group in values])
        for number, descent, group_keys, group_values in zip(
            numbers, descend(forward, v_0, hparams), keys, values, strict=True
        ):
            found[number] = OptimisedValue.of(descent, group_keys, group_values[-1])
    if all(already for value in found.values() for already in value.answered):
        raise nothing_to_edit([fact for group in groups for fact in group])
    return [found[number] for number in range(len(groups))]


@dataclass(frozen=True)
class ResumedForward:
    """Forwards that start at the edit: δ [G, S, D] → logits of the rows of all groups.

    state: at the edited layer, or where the attention's output is moved below it. is_lookup: [rows, S, 1], the token of
    each row that δ is added to. group_of: [rows].
    """

    lm: EditableLM
    groups: tuple[GroupTexts, ...]
    state: SuffixState
    is_lookup: Tensor
    group_of: Tensor
    layer: int
    sites: tuple[str, ...]
    read_layers: tuple[int, ...]

    @classmethod
    def start(
        cls, lm: EditableLM, groups: Sequence[GroupTexts], layer: int, sites: tuple[str, ...], hparams: ValueHparams
    ) -> tuple[ResumedForward, list[Tensor], list[list[Tensor]]]:
        """The forward, and per group its first fact's unedited keys [P, M] and values at each site [P, D]."""
        # where the prompts end is told too: an active codebook or side memory decides by it
        batch = lm.encode(
            [row for group in groups for row in group.rows],
            prompt_lengths=[length for group in groups for length in group.prompt_lengths],
        )
        lookup = [place for group in groups for place in group.lookup]
        # a standalone target of an always-prepend tokenizer is read from one token before the prompt's last one, which
        # may lie before the subject's last: that term is constant in δ, but belongs to the loss (methods §2.4 item 4)
        reads = [read for group in groups for read in group.answer_at]
        starts = [min(place, *read) for place, read in zip(lookup, reads, strict=True)]
        key_site, value_sites = Site("key", layer), [Site(kind, layer) for kind in sites]
        begin = layer - 1 if sites == ATTENTION_AND_VALUE else layer
        with torch.no_grad(), lm.capture([key_site, *value_sites]) as seen:
            state = lm.suffix_state(batch, begin, starts)
        at_lookup = sent(torch.tensor(lookup), lm.device)
        bounds = _first_rows(groups)
        keys = [seen.at(key_site, at_lookup)[first:end] for first, end in bounds]
        values = [[seen.at(site, at_lookup)[first:end] for site in value_sites] for first, end in bounds]
        suffix = torch.arange(state.hidden.shape[1], device=state.hidden.device)
        is_lookup = (suffix == (at_lookup - state.starts).to(suffix.device)[:, None])[..., None]
        group_of = [number for number, group in enumerate(groups) for _ in group.rows]
        read_layers = _read_layers(lm, groups, sites, hparams)
        forward = cls(
            lm, tuple(groups), state, is_lookup, sent(torch.tensor(group_of), suffix.device), layer, sites, read_layers
        )
        return forward, keys, values

    def logits(self, deltas: Tensor) -> Tensor:
        """See `value_descent.Forward`."""
        rows = deltas.to(self.state.hidden)[self.group_of]  # [rows, S, D]
        added = [self.is_lookup * rows[:, site, None] for site in range(len(self.sites))]
        at = [read for group in self.groups for read in group.answer_at]
        if len(added) == 1:  # a change of the MLP's output is one of the residual stream leaving the layer
            return self.lm.resume(self.state, self.state.hidden + added[0], at=at, read_layers=self.read_layers)
        with ExitStack() as stack:
            for kind, change in zip(self.sites, added, strict=True):
                change = change.to(self.lm.layer_device(self.layer))  # the state may lie a layer below
                stack.enter_context(self.lm.patch(Site(kind, self.layer), change.add))
            return self.lm.resume(self.state, self.state.hidden, at=at, read_layers=self.read_layers)

    def select(self, groups: Sequence[int]) -> ResumedForward:
        """See `value_descent.Forward`."""
        chosen = [self.groups[number] for number in groups]
        ends = list(accumulate(group.n_rows for group in self.groups))
        rows = [row for number in groups for row in range(ends[number] - self.groups[number].n_rows, ends[number])]
        group_of = [place for place, group in enumerate(chosen) for _ in group.rows]
        device = self.group_of.device
        return ResumedForward(
            self.lm, tuple(chosen), self.state.select(rows), self.is_lookup[sent(torch.tensor(rows), device)],
            sent(torch.tensor(group_of), device), self.layer, self.sites,
            tuple(self.read_layers[row] for row in rows),
        )  # fmt: skip


def _read_layers(
    lm: EditableLM, groups: Sequence[GroupTexts], sites: tuple[str, ...], hparams: ValueHparams
) -> tuple[int, ...]:
    """Layer after which each row's logits are read: v_loss_layer for targets, the last for the KL prompt."""
    last = lm.n_layers - 1
    loss_layer = last if hparams.v_loss_layer is None or sites == VALUE else lm.check_layer(hparams.v_loss_layer)
    return tuple(layer for group in groups for layer in (*[loss_layer] * (group.n_rows - 1), last))


def _first_rows(groups: Sequence[GroupTexts]) -> list[tuple[int, int]]:
    """(first, end) of each group's rows of its first fact."""
    bounds, begin = [], 0
    for group in groups:
        bounds.append((begin, begin + group.n_prompts))
        begin += group.n_rows
    return bounds


def _chunks(texts: Sequence[GroupTexts], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of groups whose rows, padded, stay within `max_tokens` (one group at least), longest first."""
    order = sorted(range(len(texts)), key=lambda number: (-texts[number].longest, number))
    chunk: list[int] = []
    n_rows = 0
    for number in order:
        longest = texts[chunk[0]].longest if chunk else 0
        if chunk and (n_rows + texts[number].n_rows) * longest > max_tokens:
            yield chunk
            chunk, n_rows = [], 0
        chunk.append(number)
        n_rows += texts[number].n_rows
    if chunk:
        yield chunk
