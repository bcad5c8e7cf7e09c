"""The loss that training editors share: mean negative log-probability of target tokens (methods §5.8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rep_fast.facts import Fact
from rep_fast.models import Batch, EditableLM
from rep_fast.models.transfer import sent

Objective = Literal["prompt_last", "target_new"]


@dataclass(frozen=True)
class TargetLoss:
    """Which logits of some facts score which target tokens.

    inputs: ids per fact. prompt_lengths: how many of them are the prompt's. at: positions whose logits are read, per
    fact. rows: which of these logits, in order, scores which of target_ids; weights: share of each score in the loss,
    so that facts count alike and a fact's tokens alike.
    """

    inputs: tuple[tuple[int, ...], ...]
    prompt_lengths: tuple[int, ...]
    at: tuple[tuple[int, ...], ...]
    rows: Tensor
    target_ids: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls, lm: EditableLM, facts: Sequence[Fact], *, objective: Objective = "target_new",
        target_tok: str = "in_context",
    ) -> TargetLoss:  # fmt: skip
        """The loss of some facts.

        Args:
            objective: "target_new" is ordinary teacher forcing; "prompt_last" scores every target token at the prompt's
                last token.
        Raises:
            TokenizationError, PromptError: see `EditableLM.answer`.
        """
        inputs, prompt_lengths, at, weights, first = [], [], [], [], 0
        rows: list[int] = []
        target_ids: list[int] = []
        for fact in facts:
            answer = lm.answer(fact.text, fact.target_new, mode=target_tok)
            count, teaches = answer.n_targets, objective == "target_new"
            inputs.append(answer.input_ids if teaches else answer.prompt_ids)
            prompt_lengths.append(answer.prompt_length if teaches else len(answer.prompt_ids))
            at.append(answer.positions if teaches else (len(answer.prompt_ids) - 1,))
            rows += list(range(first, first + count)) if teaches else [first] * count
            target_ids += answer.target_ids
            weights += [1 / (count * len(facts))] * count
            first += len(at[-1])
        wide = torch.promote_types(lm.dtype, torch.float32)
        return cls(
            tuple(inputs), tuple(prompt_lengths), tuple(at), sent(torch.tensor(rows), lm.device),
            sent(torch.tensor(target_ids), lm.device), sent(torch.tensor(weights, dtype=wide), lm.device),
        )  # fmt: skip

    @property
    def n_facts(self) -> int:
        """Facts whose mean the loss is."""
        return len(self.inputs)

    def batch(self, lm: EditableLM) -> Batch:
        """The inputs, told where their prompts end: an active codebook or side memory decides by it."""
        return lm.encode(self.inputs, prompt_lengths=self.prompt_lengths)

    def __call__(self, logits: Tensor) -> Tensor:
        """Scalar loss from the logits [Σ, V] at `at`, row after row; float32 or wider."""
        log_p = logits.to(self.weights).log_softmax(dim=-1)
        return -(self.weights * log_p[self.rows, self.target_ids]).sum()
