"""Which (prompt, target) pairs an edit case asks, and in which group each is counted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from rep_fast.evaluation.scoring import Question
from rep_fast.facts import EditCase, PerturbedCase, SubjectPrompt
from rep_fast.models import EditableLM

# How zsRE's neighbours begin: questions of Natural Questions, without their question mark.
_QUESTION = "nq question:"
# Groups whose prompts differ from the edited one in the subject's form or in what stands before it.
PERTURBED_GROUPS = ("rephrase_id", "rephrase_ood", "shuffle_id", "shuffle_ood", "long_id", "long_ood")


@dataclass(frozen=True)
class CaseQuestion:
    """One question with its place: `group` says which prompts, `role` which target ("new", "true" or "kept").

    Role "kept" stands for the answer of a neighbour prompt; agreement with the unedited model is counted there. Group
    "question" asks neighbours that are questions once more, with their question mark, for the right answer (zsRE).
    """

    group: str
    role: str
    question: Question


def case_questions(
    case: EditCase,
    perturbed: PerturbedCase,
    *,
    lm: EditableLM | None = None,
    without_neighbours: Collection[str] = (),
) -> list[CaseQuestion]:
    """Every question of a case; with `lm`, the subject's last token is located for the oracle's prompts."""
    asked = base_questions(case, lm=lm, without_neighbours=without_neighbours)
    return [*asked, *perturbed_questions(case, perturbed, lm=lm)]


def base_questions(
    case: EditCase, *, lm: EditableLM | None = None, without_neighbours: Collection[str] = ()
) -> list[CaseQuestion]:
    """Questions that do not depend on the seed: the prompt, its paraphrases, the neighbours."""
    fact = case.fact
    asked = [_subject_question("success", "new", SubjectPrompt(fact.prompt, fact.subject), fact.target_new, lm)]
    if fact.target_true:
        asked.append(CaseQuestion("success", "true", Question(fact.text, fact.target_true)))
    for prompt in case.paraphrase_prompts:
        asked.append(CaseQuestion("paraphrase", "new", Question(prompt, fact.target_new)))
        if fact.target_true:
            asked.append(CaseQuestion("paraphrase", "true", Question(prompt, fact.target_true)))
    asked += neighbour_questions(case, without=without_neighbours)
    return asked


def neighbour_questions(case: EditCase, *, without: Collection[str] = ()) -> list[CaseQuestion]:
    """The neighbour prompts, each with its own answer and, where that is one, with the edit's new target.

    Args:
        without: neighbour prompts that are asked in no group.
    """
    if not case.neighborhood_target:
        return []
    prompts = [prompt for prompt in case.neighborhood_prompts if prompt not in without]
    asked = [CaseQuestion("locality", "kept", Question(prompt, case.neighborhood_target)) for prompt in prompts]
    # NS and NM compare the new target with the true one: only neighbours that share the true object have both.
    if case.neighborhood_target == case.fact.target_true:
        asked += [CaseQuestion("locality", "new", Question(prompt, case.fact.target_new)) for prompt in prompts]
    asked += [
        CaseQuestion("question", "true", Question(_with_mark(prompt), case.neighborhood_target))
        for prompt in prompts
        if _is_question(prompt)
    ]
    return asked


def asks_questions(case: EditCase) -> bool:
    """Whether neighbours are questions with an answer, as in zsRE; those that are left out count too."""
    return bool(case.neighborhood_target) and any(map(_is_question, case.neighborhood_prompts))


def edited_neighbours(case: EditCase, edited: Collection[str]) -> tuple[str, ...]:
    """Neighbour prompts that, as they stand or as the question with its mark, are among the `edited` prompts."""
    if not case.neighborhood_target:
        return ()
    return tuple(
        prompt
        for prompt in case.neighborhood_prompts
        if prompt in edited or (_is_question(prompt) and _with_mark(prompt) in edited)
    )


def _is_question(prompt: str) -> bool:
    return prompt.lower().startswith(_QUESTION)


def _with_mark(prompt: str) -> str:
    return f"{prompt.rstrip(' ?')}?"


def perturbed_questions(
    case: EditCase, perturbed: PerturbedCase, *, lm: EditableLM | None = None
) -> list[CaseQuestion]:
    """The new target after each rephrased subject, shuffled subject and long context (methods §8)."""
    return [
        _subject_question(group, "new", prompt, case.fact.target_new, lm)
        for group, prompt in _perturbed_prompts(perturbed)
    ]


def _perturbed_prompts(perturbed: PerturbedCase) -> Iterator[tuple[str, SubjectPrompt]]:
    for kind in ("rephrase", "shuffle", "long"):
        sided = getattr(perturbed, kind)
        for prompt in sided.in_domain:
            yield f"{kind}_id", prompt
        for prompt in sided.out_of_domain:
            yield f"{kind}_ood", prompt


def _subject_question(group: str, role: str, prompt: SubjectPrompt, target: str, lm: EditableLM | None) -> CaseQuestion:
    position = lm.locate(prompt.prompt, prompt.subject).position if lm is not None else None
    return CaseQuestion(group, role, Question(prompt.text, target, position))
