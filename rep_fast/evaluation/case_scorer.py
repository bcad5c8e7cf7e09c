"""Scoring one case on the model as it stands; what a case asks is planned once and run for every column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rep_fast.edits import Edit
from rep_fast.errors import NonFiniteError, NothingToEditError, PromptError, SolverError, TokenizationError
from rep_fast.evaluation.fluency import (
    GenerationPrompt,
    References,
    fluency,
    generation_prompts,
    word_tokenizer,
    write_text,
)
from rep_fast.evaluation.oracle import oracle_patch, wanted_value
from rep_fast.evaluation.protocol import Protocol, perturb_case
from rep_fast.evaluation.questions import (
    PERTURBED_GROUPS,
    CaseQuestion,
    asks_questions,
    case_questions,
    edited_neighbours,
    neighbour_questions,
)
from rep_fast.evaluation.records import CaseRecord, GeneratedText, case_scores
from rep_fast.evaluation.run_directory import RunDirectory
from rep_fast.evaluation.scoring import PlannedBatch, ScoringPlan, TargetScore, plan_scoring, run_scoring
from rep_fast.facts import EditCase, PerturbedCase, TextSource
from rep_fast.models import EditableLM

# What is wrong with one record must not end a run of hundreds, nor a model that a sequence of edits has driven to NaN;
# anything else is wrong with the run and does.
CASE_ERRORS = (PromptError, NothingToEditError, TokenizationError, NonFiniteError, SolverError)
# padded tokens of the plans that are kept between columns and checkpoints; a token costs some hundred bytes
_KEPT_TOKENS = 1_000_000


@dataclass(frozen=True)
class PlannedCase:
    """Everything that is asked of a case, tokenised and batched."""

    perturbed: PerturbedCase
    left_out: tuple[str, ...]  # neighbour prompts that are not asked
    asked: tuple[CaseQuestion, ...]
    scoring: ScoringPlan
    prompts: tuple[GenerationPrompt, ...]


class CaseScorer:
    """Scores cases by one protocol.

    Args:
        before: case_id → the unedited model's arg-max per "kept" question, see `pre_edit`.
        references: texts that consistency compares with; None leaves it out.
    Raises:
        MissingDependencyError: texts are to be generated and nltk is not installed.
    """

    def __init__(
        self,
        lm: EditableLM,
        *,
        text: TextSource | None,
        protocol: Protocol,
        token_budget: int,
        before: Mapping[int, Sequence[Sequence[int]]],
        references: References | None = None,
    ) -> None:
        self._lm, self._text, self._protocol, self._token_budget = lm, text, protocol, token_budget
        self._before, self._references = before, references
        self._words = word_tokenizer() if protocol.generated_tokens else None
        self._plans: dict[tuple[int, int], PlannedCase] = {}
        self._kept_tokens = 0
        self._edited_prompts: frozenset[str] = frozenset()

    def begin_group(self, cases: Sequence[EditCase]) -> None:
        """These records are edited together from here on; plans made so far are dropped.

        A neighbour prompt that asks, word for word, what the group edits shall not keep its answer: the protocol says
        whether it is asked.
        """
        self._plans.clear()
        self._kept_tokens = 0
        self._edited_prompts = frozenset(
            prompt for case in cases for prompt in (case.fact.text, *case.paraphrase_prompts)
        )

    def plan(self, case: EditCase, seed: int) -> PlannedCase:
        """What is asked of a case.

        Raises:
            PromptError, TokenizationError: a text of the case cannot be asked.
        """
        if (seed, case.case_id) in self._plans:
            return self._plans[seed, case.case_id]
        n_tokens = self._protocol.generated_tokens
        perturbed = perturb_case(self._lm, case, text=self._text, seed=seed, protocol=self._protocol)
        left_out = self._left_out(case)
        asked = tuple(case_questions(case, perturbed, without_neighbours=left_out))
        prompts = generation_prompts(self._lm, case, seed=seed, n_tokens=n_tokens) if n_tokens else ()
        made = PlannedCase(perturbed, left_out, asked, self._batches(asked), prompts)
        if self._kept_tokens + made.scoring.n_tokens <= _KEPT_TOKENS:
            self._plans[seed, case.case_id] = made
            self._kept_tokens += made.scoring.n_tokens
        return made

    def score(self, case: EditCase, seed: int, **labels: Any) -> CaseRecord:
        """Scores of a case on the model as it stands; `labels`: further fields of the record."""
        planned = self.plan(case, seed)
        scores = run_scoring(self._lm, planned.scoring)
        generated = self._generated(planned)
        # ROME compares what is written about the subject in its generation prompts, where there are any
        own = [text.text for text in generated if text.kind == "generation"] or [text.text for text in generated]
        consistency = self._references.consistency(case.fact.target_new, own) if self._references else None
        sorted_scores = case_scores(planned.asked, scores, before=self._before_of(case, planned.left_out))
        return CaseRecord(
            seed,
            case.case_id,
            scores=sorted_scores,
            generated=generated,
            consistency=consistency,
            neighbours_left_out=len(planned.left_out),
            asks_questions=asks_questions(case),
            **labels,
        )

    def score_ceiling(self, case: EditCase, seed: int, edit: Edit, **labels: Any) -> CaseRecord:
        """Scores of the unedited model with the edit's v* forced where the subject ends (see `oracle`)."""
        asked = [
            item
            for item in case_questions(case, self.plan(case, seed).perturbed, lm=self._lm)
            if item.role == "new" and item.group in ("success", *PERTURBED_GROUPS)
        ]
        scores = _score_ceiling(self._lm, edit, self._batches(asked))
        return CaseRecord(seed, case.case_id, scores=case_scores(asked, scores), **labels)

    def _left_out(self, case: EditCase) -> tuple[str, ...]:
        return edited_neighbours(case, self._edited_prompts) if self._protocol.edited_neighbours == "drop" else ()

    def _before_of(self, case: EditCase, left_out: Sequence[str]) -> list[Sequence[int]]:
        kept = [item for item in neighbour_questions(case) if item.role == "kept"]
        answers = zip(kept, self._before[case.case_id], strict=True)
        return [predicted for item, predicted in answers if item.question.prompt not in left_out]

    def _batches(self, asked: Sequence[CaseQuestion]) -> ScoringPlan:
        questions = [item.question for item in asked]
        return plan_scoring(self._lm, questions, token_budget=self._token_budget, target_tok=self._protocol.target_tok)

    def _generated(self, planned: PlannedCase) -> tuple[GeneratedText, ...]:
        if self._words is None:
            return ()
        texts = [
            (prompt.kind, write_text(self._lm, prompt, n_tokens=self._protocol.generated_tokens))
            for prompt in planned.prompts
        ]
        return tuple(GeneratedText(kind, text, fluency(self._words(text))) for kind, text in texts)


def pre_edit(
    lm: EditableLM, cases: Sequence[EditCase], run: RunDirectory, *, protocol: Protocol, token_budget: int
) -> dict[int, list[list[int]]]:
    """Arg-max tokens of the unedited model at the answer positions of all neighbours, computed once per run."""
    stored = run.read_json("pre_edit.json")
    if stored is not None:
        return {int(case_id): predicted for case_id, predicted in stored.items()}
    predicted: dict[int, list[list[int]]] = {}
    for case in cases:
        kept = [item.question for item in neighbour_questions(case) if item.role == "kept"]
        try:
            plan = plan_scoring(lm, kept, token_budget=token_budget, target_tok=protocol.target_tok)
        except CASE_ERRORS:
            continue  # planning the case itself meets the same error, which is recorded there
        predicted[case.case_id] = [list(score.argmax) for score in run_scoring(lm, plan)]
    run.write_json("pre_edit.json", predicted)
    return predicted


def _score_ceiling(lm: EditableLM, edit: Edit, plan: ScoringPlan) -> list[TargetScore]:
    wanted_value(edit)

    def around(planned: PlannedBatch) -> Any:
        return oracle_patch(lm, edit, planned.subject_positions)

    return run_scoring(lm, plan, around=around)
