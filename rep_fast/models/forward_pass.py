"""What hooks are told about the tokens that pass through them.

An edit that replaces a module's output decides by what stands at the end of a prompt, or by the prompt as a whole
(GRACE, WISE; methods §5.13, §5.14). Inside a hook a tensor [n, T, *] shows neither where prompts end nor which tokens
are pads, nor, in a later step of a generation, what was decided when the prompt went through.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rep_fast.models.batch import Batch


@dataclass(frozen=True)
class ForwardPass:
    """The rows of one forward pass.

    prompt_lengths: [n] int64, tokens of each row that are its prompt. begin: position of the pass's first column, above
    0 only in later steps of a generation. kept: what hooks have decided about these rows; it lives as long as the
    sequences, so that later steps find it.
    """

    prompt_lengths: Tensor
    begin: int = 0
    kept: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> ForwardPass:
        """A pass of whole rows; where a batch does not say how long its prompts are, rows are all prompt."""
        return cls(batch.lengths if batch.prompt_lengths is None else batch.prompt_lengths)

    @property
    def begins(self) -> bool:
        """Whether the rows' first tokens, and with them their prompts, go through now."""
        return self.begin == 0

    def is_prompt(self, width: int) -> Tensor:
        """[n, width] bool: which columns of the pass are tokens of a prompt."""
        return self._positions(width) < self.prompt_lengths[:, None]

    def is_prompt_end(self, width: int) -> Tensor:
        """[n, width] bool: the last token of each prompt, where it lies in this pass."""
        return self._positions(width) == self.prompt_lengths[:, None] - 1

    def _positions(self, width: int) -> Tensor:
        return self.begin + torch.arange(width, device=self.prompt_lengths.device)
