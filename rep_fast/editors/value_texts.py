"""The texts a value is optimised on: prompt and target behind each template, and the prompt of the KL term.

Facts that say several things of one subject behind the same words have one key, and no update can give one key two
values; such facts form a group, for which one vector is optimised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.errors import TokenizationError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.models.transfer import sent

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class EditTexts:
    """Token rows of one fact: the prompt behind each template, then the KL prompt.

    rows: ids, the new target's tokens but the last appended to all but the last row. lookup: position of the subject's
    last token per row. answer_at: per row the positions whose logits are read. prompt_lengths: tokens of each row that
    are its prompt. target_ids: of each row but the KL prompt's.
    """

    rows: tuple[tuple[int, ...], ...]
    lookup: tuple[int, ...]
    answer_at: tuple[tuple[int, ...], ...]
    prompt_lengths: tuple[int, ...]
    target_ids: tuple[tuple[int, ...], ...]


def edit_texts(
    lm: EditableLM,
    fact: Fact,
    templates: Sequence[str],
    *,
    fact_token: str = "subject_last",
    target_tok: str = "in_context",
) -> EditTexts:
    """Compose templates, prompt and target (methods §2.1, §2.4 item 4).

    Raises:
        TokenizationError: standalone targets have pulled the subject's last tokens out of a text.
    """
    rows, lookup, answer_at, prompt_lengths, targets = [], [], [], [], []
    for template in templates:
        prompt = template.replace("{}", fact.prompt)
        answer = lm.answer(prompt.replace("{}", fact.subject), fact.target_new, mode=target_tok)
        rows.append(answer.input_ids)
        answer_at.append(answer.positions)
        prompt_lengths.append(answer.prompt_length)
        targets.append(answer.target_ids)
        located = lm.locate(prompt, fact.subject, strategy=fact_token)
        lookup.append(located.position)
        # the row may be long enough and yet hold other tokens there
        if answer.input_ids[: located.position + 1] != located.ids[: located.position + 1]:
            raise TokenizationError(
                f"target {fact.target_new!r} runs together with subject {fact.subject!r} at the end of "
                f"{prompt!r} in standalone mode; use target_tok=in_context"
            )
    kept = lm.locate(KL_PROMPT, fact.subject, strategy=fact_token)
    # the KL term reads the logits at the lookup token: nothing after it matters
    rows.append(kept.ids[: kept.position + 1])
    lookup.append(kept.position)
    answer_at.append((kept.position,))
    prompt_lengths.append(kept.position + 1)
    return EditTexts(tuple(rows), tuple(lookup), tuple(answer_at), tuple(prompt_lengths), tuple(targets))


@dataclass(frozen=True)
class GroupTexts:
    """Token rows behind one vector: those of each fact of a group, then one KL prompt.

    facts: of the group. rows, lookup, answer_at, prompt_lengths: as in `EditTexts`. targets: per row its target's ids,
    none for the KL prompt. n_prompts: P, rows per fact.
    """

    facts: tuple[Fact, ...]
    rows: tuple[tuple[int, ...], ...]
    lookup: tuple[int, ...]
    answer_at: tuple[tuple[int, ...], ...]
    prompt_lengths: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    n_prompts: int

    @classmethod
    def of(cls, facts: Sequence[Fact], texts: Sequence[EditTexts]) -> GroupTexts:
        """The group of facts whose texts these are; their subject is one, so the first one's KL prompt serves all."""
        targets = [row for found in texts for row in found.target_ids]
        return cls(
            tuple(facts),
            (*(row for found in texts for row in found.rows[:-1]), texts[0].rows[-1]),
            (*(place for found in texts for place in found.lookup[:-1]), texts[0].lookup[-1]),
            (*(read for found in texts for read in found.answer_at[:-1]), texts[0].answer_at[-1]),
            (*(length for found in texts for length in found.prompt_lengths[:-1]), texts[0].prompt_lengths[-1]),
            (*targets, ()),
            len(texts[0].rows) - 1,
        )

    @property
    def n_rows(self) -> int:
        """Token rows, the KL prompt among them."""
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))


@dataclass(frozen=True)
class LossRows:
    """Which rows of the logits enter whose loss: logits lie row after row, groups one after another.

    nll_at, target_ids, weights, fact_of, group_of, is_bare: [Σ] of the target tokens, weights adding up to 1 per group;
    facts are numbered through all groups. kl_at: [G], one per group. n_facts: per group.
    """

    nll_at: Tensor
    target_ids: Tensor
    weights: Tensor
    fact_of: Tensor
    group_of: Tensor
    is_bare: Tensor
    kl_at: Tensor
    n_facts: tuple[int, ...]

    @classmethod
    def of(cls, groups: Sequence[GroupTexts], *, device: torch.device) -> LossRows:
        """Bookkeeping for the logits of these groups."""
        entries: list[tuple[int, int, float, int, int, bool]] = []
        kl_at, place, first_fact = [], 0, 0
        for number, group in enumerate(groups):
            n_facts, n_prompts = len(group.facts), group.n_prompts
            for row, targets in enumerate(group.targets[:-1]):
                fact, template = divmod(row, n_prompts)
                weight = 1 / (n_facts * n_prompts * len(targets))
                for target in targets:
                    entries.append((place, target, weight, first_fact + fact, number, template == 0))
                    place += 1
            kl_at.append(place)
            place += 1
            first_fact += n_facts
        n_facts_of = tuple(len(group.facts) for group in groups)
        at, ids, weights, fact_of, group_of, is_bare = (
            sent(torch.tensor(column, dtype=torch.float64 if isinstance(column[0], float) else None), device)
            for column in zip(*entries, strict=True)
        )
        return cls(at, ids, weights, fact_of, group_of, is_bare, sent(torch.tensor(kl_at), device), n_facts_of)

    def nll(self, log_p: Tensor) -> Tensor:
        """Mean negative log-likelihood of each group's targets [G], from log-probabilities of all rows [Σ, V]."""
        picked = log_p[self.nll_at, self.target_ids]
        return picked.new_zeros(len(self.kl_at)).index_add(0, self.group_of, -picked * self.weights.to(picked))

    def is_best(self, log_p: Tensor) -> Tensor:
        """[Σ] whether each target token is the most likely one."""
        return log_p[self.nll_at].argmax(dim=-1) == self.target_ids

    def facts_answered(self, log_p: Tensor) -> list[tuple[bool, ...]]:
        """Per group, per fact of it: whether the bare prompt is answered with the whole target."""
        wrong = (~self.is_best(log_p) & self.is_bare).long()
        right = iter((wrong.new_zeros(sum(self.n_facts)).index_add(0, self.fact_of, wrong) == 0).tolist())
        return [tuple(next(right) for _ in range(count)) for count in self.n_facts]

    def groups_answered(self, log_p: Tensor) -> Tensor:
        """[G] whether every text of a group is answered with its whole target."""
        wrong = (~self.is_best(log_p)).long()
        return wrong.new_zeros(len(self.kl_at)).index_add(0, self.group_of, wrong) == 0
