"""Keys of a batch of facts, layer after layer, while the layers below are being edited (methods §2.2, §5.3).

The key of a fact is that of the subject's last token, half from the bare prompt and half from the mean over the
prefixed ones. Tokens after it cannot be seen from there, so every text ends with it; texts that several facts share run
once; a pass starts at the last edited layer and ends where it reads. `write_layers` in `batch.py` tells when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.facts import Fact
from rep_fast.models import Batch, EditableLM, RowState, Site, advance, enter_layer, read_rows
from rep_fast.models.transfer import sent

# padded tokens of one pass
PASS_TOKENS = 16384
# padded tokens whose residual stream is kept between layers; a larger batch starts each pass from its tokens
KEPT_TOKENS = 2**17


@dataclass(frozen=True)
class LookupRows:
    """Token rows of facts behind templates, each ending with the token that is looked up.

    bare, prefixed: distinct rows of ids. row_of: [n, P] number of the row of each fact and template, the bare rows
    counted first.
    """

    bare: tuple[tuple[int, ...], ...]
    prefixed: tuple[tuple[int, ...], ...]
    row_of: Tensor

    @classmethod
    def of(
        cls, lm: EditableLM, facts: Sequence[Fact], templates: Sequence[str], *, fact_token: str = "subject_last"
    ) -> LookupRows:
        """Rows of facts; the first template is the bare `{}`."""
        texts = [[_cut(lm, template, fact, fact_token) for template in templates] for fact in facts]
        bare = tuple(dict.fromkeys(row[0] for row in texts))
        prefixed = tuple(dict.fromkeys(ids for row in texts for ids in row[1:]))
        number_of_bare = {ids: number for number, ids in enumerate(bare)}
        number_of = {ids: len(bare) + number for number, ids in enumerate(prefixed)}
        row_of = [[number_of_bare[row[0]], *(number_of[ids] for ids in row[1:])] for row in texts]
        return cls(bare, prefixed, torch.tensor(row_of))


def _cut(lm: EditableLM, template: str, fact: Fact, fact_token: str) -> tuple[int, ...]:
    located = lm.locate(template.replace("{}", fact.prompt), fact.subject, strategy=fact_token)
    return located.ids[: located.position + 1]


class KeyReader:
    """Reads keys at one layer after the other, upwards; edits made in between at layers already read are seen."""

    def __init__(
        self, lm: EditableLM, rows: LookupRows, *, max_tokens: int = PASS_TOKENS, kept_tokens: int = KEPT_TOKENS
    ) -> None:
        self._lm, self._row_of = lm, rows.row_of
        self._n_bare = len(rows.bare)
        self._chunks = [
            _Chunk(batch.select(part), [first + row for row in part], is_bare)
            for ids, first, is_bare in ((rows.bare, 0, True), (rows.prefixed, self._n_bare, False))
            if ids
            for batch in [lm.encode(ids)]
            for part in batch.chunks(max_tokens)
        ]
        self._keeps = sum(chunk.batch.input_ids.numel() for chunk in self._chunks) <= kept_tokens

    def read(self, layer: int, site: Site) -> tuple[Tensor, Tensor]:
        """Keys [n, M] at `layer`, and what stands at `site`, there or above, in the bare prompts [n, *].

        Layers must be read in ascending order.
        """
        keys: dict[int, Tensor] = {}
        values: dict[int, Tensor] = {}
        key_site = Site("key", layer)
        for chunk in self._chunks:
            state = self._entering(chunk, layer)
            seen = read_rows(self._lm, state, [key_site, site] if chunk.is_bare else [key_site])
            keys |= zip(chunk.numbers, _last_tokens(seen[key_site], chunk.batch), strict=True)
            if chunk.is_bare:
                values |= zip(chunk.numbers, _last_tokens(seen[site], chunk.batch), strict=True)
        stacked = torch.stack([keys[number] for number in range(len(keys))])
        row_of = sent(self._row_of, stacked.device)
        bare = row_of[:, 0]
        averaged = stacked[bare]
        if self._row_of.shape[1] > 1:  # template by template: [n, P, M] at once would be large
            rest = sum(stacked[column] for column in row_of[:, 1:].T) / (self._row_of.shape[1] - 1)
            averaged = (averaged + rest) / 2
        return averaged, torch.stack([values[number] for number in self._row_of[:, 0].tolist()])

    def _entering(self, chunk: _Chunk, layer: int) -> RowState:
        if chunk.state is None:
            state = enter_layer(self._lm, chunk.batch, layer)
        else:
            state = advance(self._lm, chunk.state, layer)
        chunk.state = state if self._keeps else None
        return state


def _last_tokens(tensor: Tensor, batch: Batch) -> Tensor:
    """[n, T, *] → [n, *] float32 or wider, at each row's last token."""
    rows = torch.arange(len(tensor), device=tensor.device)
    found = tensor[rows, batch.lengths.to(tensor.device) - 1]
    return found.to(torch.promote_types(found.dtype, torch.float32))


@dataclass
class _Chunk:
    """Rows that run together, their numbers among all, and how far they have come (None: not kept)."""

    batch: Batch
    numbers: list[int]
    is_bare: bool
    state: RowState | None = None
