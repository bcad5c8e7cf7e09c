"""Which facts a model answers already, and the one rule about them.

A call is refused when nothing in it is left to edit. Else the facts that are answered already are named in
`notes["answered_before"]`. Editors that make something for each fact alone (GRACE, WISE) leave them out, unless an
earlier fact of the same call writes their prompt (`left_out`), and name what they left out; those that write all facts
together (fine-tuning, LoRA, PAC, the batches in closed form) keep them, since what the other facts change could take
their answers away. Fine-tuning alone has a published measure of its own and goes on below certainty:
it refuses where every loss is below its floor (methods §5.8).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

import torch
from torch import Tensor

from rep_fast.errors import NothingToEditError
from rep_fast.facts import Fact
from rep_fast.models import Answer, EditableLM

# answers whose logits, each as wide as the vocabulary, are held at a time
ANSWERS_PER_PASS = 64


@torch.no_grad()
def said_instead(lm: EditableLM, answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    """Per answer the model's most likely token at each of its positions, the tokens before it being fed."""
    best: list[Tensor] = []
    for begin in range(0, len(answers), ANSWERS_PER_PASS):
        some = answers[begin : begin + ANSWERS_PER_PASS]
        # where the prompts end is told too: an active codebook or side memory decides by it
        batch = lm.encode(
            [answer.input_ids for answer in some], prompt_lengths=[answer.prompt_length for answer in some]
        )
        best.append(lm.logits(batch, at=[answer.positions for answer in some]).argmax(dim=-1))
    said = iter(torch.cat(best).tolist() if best else [])
    return [tuple(islice(said, answer.n_targets)) for answer in answers]


def are_answered(lm: EditableLM, facts: Sequence[Fact], *, target_tok: str) -> list[bool]:
    """Per fact whether the model, as it stands, answers its bare prompt with the new target."""
    answers = [lm.answer(fact.text, fact.target_new, mode=target_tok) for fact in facts]
    said = said_instead(lm, answers)
    return [own == tuple(answer.target_ids) for own, answer in zip(said, answers, strict=True)]


def unanswered(lm: EditableLM, facts: Sequence[Fact], *, target_tok: str) -> list[Fact]:
    """The facts whose bare prompt the model, as it stands, does not answer with the new target."""
    return [
        fact for fact, is_so in zip(facts, are_answered(lm, facts, target_tok=target_tok), strict=True) if not is_so
    ]


def answered_before(lm: EditableLM, facts: Sequence[Fact], *, target_tok: str) -> list[int]:
    """Numbers of the facts that are answered already, for an edit's notes.

    Raises:
        NothingToEditError: all are.
    """
    found = [number for number, is_so in enumerate(are_answered(lm, facts, target_tok=target_tok)) if is_so]
    if len(found) == len(facts):
        raise nothing_to_edit(facts)
    return found


def left_out(facts: Sequence[Fact], answered: Collection[int]) -> list[int]:
    """Numbers of the answered facts that need no edit: those whose prompt no earlier fact of the call writes."""
    written: set[str] = set()
    found: list[int] = []
    for number, fact in enumerate(facts):
        if number in answered and fact.text not in written:
            found.append(number)
        else:
            written.add(fact.text)
    return found


def nothing_to_edit(facts: Sequence[Fact]) -> NothingToEditError:
    """The refusal of facts that are all answered already."""
    others = "" if len(facts) == 1 else f", and so on for all {len(facts)} facts"
    return NothingToEditError(
        f"the model already answers {facts[0].text!r} with {facts[0].target_new!r}{others}; choose another target"
    )
