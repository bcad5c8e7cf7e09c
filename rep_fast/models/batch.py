"""A right-padded batch of token rows that carries its lengths.

Lengths are data, never derived from `ids != pad`: with pad = eos a genuine end-of-text token would be dropped
(methods §2.4 items 5 and 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.errors import PromptError, TokenizationError
from rep_fast.models.transfer import sent


@dataclass(frozen=True)
class Batch:
    """Token rows of different length, padded on the right.

    input_ids: [n, T] int64, T the longest row. lengths: [n] int64, each in 1..T, same device. prompt_lengths: [n]
    int64, each in 1..length: how many of a row's tokens are its prompt, what follows being a target; None: all.
    row_lengths: `lengths` as numbers, known without a look at the device.
    """

    input_ids: Tensor
    lengths: Tensor
    row_lengths: tuple[int, ...]
    prompt_lengths: Tensor | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[int]],
        *,
        prompt_lengths: Sequence[int] | None = None,
        pad_id: int = 0,
        device: torch.device | None = None,
    ) -> Batch:
        """Pad rows of ids.

        Raises:
            TokenizationError: no rows, or a row without tokens.
            PromptError: not one prompt length per row, or one outside its row.
        """
        if not rows:
            raise TokenizationError("a batch needs at least one text, got none")
        for number, row in enumerate(rows):
            if not len(row):
                raise TokenizationError(f"row {number} of the batch has no tokens; give a text that is not empty")
        width = max(len(row) for row in rows)
        if prompt_lengths is not None:
            _check_prompt_lengths(rows, prompt_lengths)
        row_lengths = tuple(len(row) for row in rows)
        made = cls(
            torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], dtype=torch.int64),
            torch.tensor(row_lengths, dtype=torch.int64),
            row_lengths,
            None if prompt_lengths is None else torch.tensor(prompt_lengths, dtype=torch.int64),
        )
        return made if device is None else made.to(device)

    @property
    def n_rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def n_tokens(self) -> int:
        """Real tokens, pads not counted."""
        return sum(self.row_lengths)

    @property
    def is_real(self) -> Tensor:
        """[n, T] bool, False at pads."""
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return positions < self.lengths[:, None]

    @property
    def attention_mask(self) -> Tensor:
        """[n, T] int64, 0 at pads."""
        return self.is_real.long()

    @property
    def position_ids(self) -> Tensor:
        """[n, T] int64: 0, 1, 2 … in every row; right padding leaves real tokens at their own positions."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)

    def rows(self) -> list[list[int]]:
        """The ids of each row without pads."""
        return [row[:length] for row, length in zip(self.input_ids.tolist(), self.row_lengths, strict=True)]

    def select(self, rows: Sequence[int]) -> Batch:
        """The given rows in the given order, cut to the longest of them."""
        index = sent(torch.as_tensor(rows, dtype=torch.int64), self.input_ids.device)
        row_lengths = tuple(self.row_lengths[row] for row in rows)
        prompts = None if self.prompt_lengths is None else self.prompt_lengths[index]
        return Batch(self.input_ids[index, : max(row_lengths)], self.lengths[index], row_lengths, prompts)

    def followed_by(self, tokens: Tensor) -> Batch:
        """One more token per row, [n] int64 on the same device; for rows of one length."""
        row_lengths = tuple(length + 1 for length in self.row_lengths)
        input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=1)
        return Batch(input_ids, self.lengths + 1, row_lengths, self.prompt_lengths)

    def to(self, device: torch.device | str) -> Batch:
        device = torch.device(device)
        prompts = None if self.prompt_lengths is None else sent(self.prompt_lengths, device)
        return Batch(sent(self.input_ids, device), sent(self.lengths, device), self.row_lengths, prompts)

    def chunks(self, max_tokens: int) -> Iterator[list[int]]:
        """Row numbers in groups of similar length whose padded size stays within `max_tokens` (one row at least)."""
        lengths = self.row_lengths
        order = sorted(range(self.n_rows), key=lambda row: (-lengths[row], row))
        begin = 0
        while begin < len(order):
            per_chunk = max(1, max_tokens // lengths[order[begin]])
            yield order[begin : begin + per_chunk]
            begin += per_chunk


def _check_prompt_lengths(rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> None:
    if len(prompt_lengths) != len(rows):
        raise PromptError(f"{len(prompt_lengths)} prompt lengths were given for {len(rows)} rows; give one per row")
    for number, (row, length) in enumerate(zip(rows, prompt_lengths, strict=True)):
        if not 1 <= length <= len(row):
            raise PromptError(f"the prompt of row {number} cannot have {length} of its {len(row)} tokens")
