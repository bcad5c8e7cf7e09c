"""v* and z by their definition: full forwards with δ added by a hook, nothing cached, one group at a time.

What `value.py` is compared with, in tests for its trajectory and in `benchmarks/bench_edit.py` for its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.editors.value import VALUE, OptimisedValue, ValueHparams
from rep_fast.editors.value_descent import descend
from rep_fast.editors.value_texts import GroupTexts, edit_texts
from rep_fast.facts import Fact
from rep_fast.models import Batch, EditableLM, Site


def optimise_value_plainly(
    lm: EditableLM, fact: Fact, *, layer: int, templates: Sequence[str], hparams: ValueHparams,
    sites: tuple[str, ...] = VALUE, target_tok: str = "in_context", together: Sequence[Fact] = (),
) -> OptimisedValue:  # fmt: skip
    """As `value.optimise_value`, with one full forward and backward of every token and the whole head per step.

    Args:
        together: more facts of the same group.
    """
    facts = (fact, *together)
    group = GroupTexts.of(facts, [edit_texts(lm, each, templates, target_tok=target_tok) for each in facts])
    forward = FullForward(
        lm, (group,), lm.encode(group.rows, prompt_lengths=group.prompt_lengths), layer, sites, hparams.v_loss_layer
    )
    key_site, value_sites = Site("key", layer), [Site(kind, layer) for kind in sites]
    with torch.no_grad(), lm.capture([key_site, *value_sites]) as seen:
        lm.logits(forward.batch)
    lookup = torch.tensor(group.lookup, device=lm.device)
    keys, *values = (seen.at(site, lookup)[: group.n_prompts] for site in (key_site, *value_sites))
    v_0 = torch.stack([value[0] for value in values])[None]
    return OptimisedValue.of(descend(forward, v_0, hparams)[0], keys, values[-1])


@dataclass(frozen=True)
class FullForward:
    """One group through the whole model. loss_layer: as `ValueHparams.v_loss_layer`, no effect on an MLP output."""

    lm: EditableLM
    groups: tuple[GroupTexts, ...]
    batch: Batch
    layer: int
    sites: tuple[str, ...]
    loss_layer: int | None

    def logits(self, deltas: Tensor) -> Tensor:
        """See `value_descent.Forward`."""
        lm, last = self.lm, self.lm.n_layers - 1
        read = last if self.loss_layer is None or self.sites == VALUE else self.loss_layer
        streams = Site("hidden", read)
        with ExitStack() as stack:
            for site, kind in enumerate(self.sites):
                stack.enter_context(lm.patch(Site(kind, self.layer), self._adding(deltas[0, site])))
            seen = stack.enter_context(lm.capture([streams]))
            logits = lm.logits(self.batch)
        early = logits if read == last else lm.head(lm.final_norm(seen[streams]))
        kl_row = self.batch.n_rows - 1
        return torch.stack(
            [
                (logits if row == kl_row else early)[row, place]
                for row, places in enumerate(self.groups[0].answer_at)
                for place in places
            ]
        )

    def select(self, groups: Sequence[int]) -> FullForward:
        """See `value_descent.Forward`."""
        return self

    def _adding(self, delta: Tensor) -> Callable[[Tensor], Tensor]:
        rows = torch.arange(self.batch.n_rows, device=delta.device)
        lookup = torch.tensor(self.groups[0].lookup, device=delta.device)

        def add(value: Tensor) -> Tensor:
            change = delta.to(value.dtype).expand(len(rows), -1)
            return value.index_put((rows, lookup), change, accumulate=True)

        return add
