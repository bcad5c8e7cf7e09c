"""What a path edit is trained on: per fact the new answer and the unedited model's own (methods §7.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rep_fast.errors import NothingToEditError
from rep_fast.facts import Fact
from rep_fast.models import Answer, EditableLM

_ROWS_PER_PASS = 64


@dataclass(frozen=True)
class Contrast:
    """One fact with its two answers: `wanted` for the positive nodes, `kept` for the negative ones."""

    fact: Fact
    wanted: Answer
    kept: Answer


def contrasts_of(lm: EditableLM, facts: Sequence[Fact], *, kept: str, target_tok: str) -> list[Contrast]:
    """Answers of all facts, from the model as it is handed over.

    Args:
        kept: "teacher_forced" takes the arg-max at each answer position while the new target is fed, so that both
            answers have one length; "free" the model's own greedy continuation of the prompt, of that length.
    Raises:
        NothingToEditError: the model answers every fact with its new target already.
    """
    wanted = [lm.answer(fact.text, fact.target_new, mode=target_tok) for fact in facts]
    said = _arg_max(lm, wanted)
    if said == [answer.target_ids for answer in wanted]:
        raise NothingToEditError(
            f"the model already answers {facts[0].text!r} with {facts[0].target_new!r}"
            + ("" if len(facts) == 1 else f", and so on for all {len(facts)} facts")
            + "; choose another target"
        )
    if kept == "free":
        answers = [_continued(lm, answer) for answer in wanted]
    else:
        answers = [replace(answer, target_ids=own) for answer, own in zip(wanted, said, strict=True)]
    return [Contrast(*parts) for parts in zip(facts, wanted, answers, strict=True)]


@torch.no_grad()
def _arg_max(lm: EditableLM, answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for begin in range(0, len(answers), _ROWS_PER_PASS):
        part = answers[begin : begin + _ROWS_PER_PASS]
        logits = lm.logits([answer.input_ids for answer in part], at=[answer.positions for answer in part])
        best = logits.argmax(dim=-1).split([answer.n_targets for answer in part])
        found += [tuple(own.tolist()) for own in best]
    return found


def _continued(lm: EditableLM, answer: Answer) -> Answer:
    ids = lm.generate_ids(answer.prompt_ids, max_new_tokens=answer.n_targets)
    return Answer.joined(answer.prompt_ids, ids[len(answer.prompt_ids) :])
