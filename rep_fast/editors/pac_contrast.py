"""What a path edit is trained on: per fact the new answer and the unedited model's own (methods §7.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rep_fast.editors.answered import nothing_to_edit, said_instead
from rep_fast.facts import Fact
from rep_fast.models import Answer, EditableLM


@dataclass(frozen=True)
class Contrast:
    """One fact with its two answers: `wanted` for the positive nodes, `kept` for the negative ones."""

    fact: Fact
    wanted: Answer
    kept: Answer

    @property
    def is_answered(self) -> bool:
        """Whether the model that was handed over gives the new answer already."""
        return self.kept.target_ids == self.wanted.target_ids


def contrasts_of(lm: EditableLM, facts: Sequence[Fact], *, kept: str, target_tok: str) -> list[Contrast]:
    """Answers of all facts, from the model as it is handed over.

    Args:
        kept: "teacher_forced" takes the arg-max at each answer position while the new target is fed, so that both
            answers have one length; "free" the model's own greedy continuation of the prompt, of that length.
    Raises:
        NothingToEditError: the model answers every fact with its new target already.
    """
    wanted = [lm.answer(fact.text, fact.target_new, mode=target_tok) for fact in facts]
    said = said_instead(lm, wanted)
    if said == [answer.target_ids for answer in wanted]:
        raise nothing_to_edit(facts)
    if kept == "free":
        answers = [_continued(lm, answer) for answer in wanted]
    else:
        answers = [replace(answer, target_ids=own) for answer, own in zip(wanted, said, strict=True)]
    return [Contrast(*parts) for parts in zip(facts, wanted, answers, strict=True)]


def _continued(lm: EditableLM, answer: Answer) -> Answer:
    ids = lm.generate_ids(answer.prompt_ids, max_new_tokens=answer.n_targets)
    return Answer.joined(answer.prompt_ids, ids[len(answer.prompt_ids) :])
