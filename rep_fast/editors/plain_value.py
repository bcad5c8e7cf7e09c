"""v* by its definition: full forwards with δ added by a hook, nothing cached.

What `value.py` is compared with, in tests for its trajectory and in `benchmarks/bench_edit.py` for its speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rep_fast.editors.value import OptimisedValue, ValueHparams, edit_texts, optimise_delta
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site


def optimise_value_plainly(
    lm: EditableLM, fact: Fact, *, layer: int, templates: Sequence[str], hparams: ValueHparams,
    target_tok: str = "in_context",
) -> OptimisedValue:  # fmt: skip
    """As `value.optimise_value`, with one full forward and backward of every token and the whole head per step."""
    texts = edit_texts(lm, fact, templates, target_tok=target_tok)
    batch = lm.encode(texts.rows)
    starts = torch.tensor(texts.lookup, device=lm.device)
    row_numbers = torch.arange(batch.n_rows, device=lm.device)
    read_rows = [row for row, positions in enumerate(texts.answer_at) for _ in positions]
    read_at = [position for positions in texts.answer_at for position in positions]
    key_site, value_site = Site("key", layer), Site("value", layer)
    with torch.no_grad(), lm.capture([key_site, value_site]) as seen:
        lm.logits(batch)
    keys, values = seen.at(key_site, starts)[:-1], seen.at(value_site, starts)[:-1]

    def logits(delta: Tensor) -> Tensor:
        def add(value: Tensor) -> Tensor:
            return value.index_put((row_numbers, starts), delta.to(value.dtype), accumulate=True)

        with lm.patch(value_site, add):
            return lm.logits(batch)[read_rows, read_at]

    deltas, losses = optimise_delta(logits, texts, values[0], hparams, fact)
    v_0 = values[0].to(deltas.dtype)
    return OptimisedValue(v_0 + deltas[-1], v_0, keys.to(deltas.dtype), values.to(deltas.dtype), losses, deltas)
