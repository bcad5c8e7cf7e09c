"""Teacher-forced scoring of (prompt, target) pairs in few batches.

A plan is made once for a set of pairs and may be run many times, once per edit: texts are tokenised once, inputs that
are equal or a prefix of one another share a row where their prompts are equally long (the shared tokens then get the
same logits), rows of similar length share a batch, and the language-model head runs at answer positions only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from rep_fast.models import Answer, Batch, EditableLM
from rep_fast.models.transfer import sent


@dataclass(frozen=True)
class Question:
    """A target to be scored after a prompt; `subject_position` is the token an oracle may patch, None for none."""

    prompt: str
    target: str
    subject_position: int | None = None


@dataclass(frozen=True)
class TargetScore:
    """How the model takes to one target under teacher forcing.

    `hits[t]` tells whether the arg-max at answer position t is the target's token, `argmax[t]` is that arg-max, `nll`
    the mean negative log-likelihood per answer token (infinite when the logits are not finite).
    """

    hits: tuple[bool, ...]
    argmax: tuple[int, ...]
    nll: float

    @property
    def exact_match(self) -> bool:
        """EM: every answer token is the arg-max (methods §9)."""
        return all(self.hits)

    @property
    def token_match(self) -> float:
        """TM: share of answer tokens that are the arg-max (methods §9); never below EM."""
        return sum(self.hits) / len(self.hits)


@dataclass
class _Row:
    ids: tuple[int, ...]
    setting: tuple[int, int]
    askers: list[int]

    @property
    def subject_position(self) -> int | None:
        return self.setting[0] if self.setting[0] >= 0 else None

    @property
    def prompt_length(self) -> int:
        return self.setting[1]


@dataclass(frozen=True)
class PlannedBatch:
    """One right-padded batch: where the head runs and which of its output rows answer which question."""

    batch: Batch
    at: list[list[int]]
    subject_positions: list[int | None]
    questions: list[int]
    lengths: list[int]
    logit_rows: torch.Tensor = field(repr=False)
    target_ids: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class ScoringPlan:
    """Batches that answer `n_questions` questions, shortest rows first."""

    batches: tuple[PlannedBatch, ...]
    n_questions: int

    @property
    def n_tokens(self) -> int:
        """Tokens one run sends through the model, padding included."""
        return sum(planned.batch.input_ids.numel() for planned in self.batches)


def plan_scoring(
    lm: EditableLM,
    questions: Sequence[Question],
    *,
    token_budget: int = 8192,
    target_tok: str = "in_context",
) -> ScoringPlan:
    """Tokenise questions and pack them into batches of at most `token_budget` tokens (a longer row stands alone).

    Raises:
        TokenizationError: a text is longer than the model's table of positions.
    """
    answers = [lm.answer(q.prompt, q.target, mode=target_tok) for q in questions]
    settings = [(_or_minus_one(q.subject_position), a.prompt_length) for q, a in zip(questions, answers, strict=True)]
    rows = _shared_rows([a.input_ids for a in answers], settings)
    for row in rows:
        lm.check_length(len(row.ids))
    batches = [_plan_batch(lm, group, answers) for group in _groups_by_length(rows, token_budget)]
    return ScoringPlan(tuple(batches), len(questions))


def run_scoring(
    lm: EditableLM,
    plan: ScoringPlan,
    *,
    around: Callable[[PlannedBatch], AbstractContextManager[object]] | None = None,
) -> list[TargetScore]:
    """Score every question of a plan with the model as it stands, in the order of the questions.

    `around(batch)` gives a context manager entered for that batch's forward pass (an oracle patch, say).
    """
    found: list[torch.Tensor] = []
    for planned in plan.batches:
        with torch.no_grad(), around(planned) if around else nullcontext():
            logits = lm.logits(planned.batch, at=planned.at)
        found.append(_answers(planned, logits))
    scores: dict[int, TargetScore] = {}
    if found:  # one copy for all batches: the host waits for a device once
        columns = torch.cat(found, dim=1).cpu().split([len(planned.target_ids) for planned in plan.batches], dim=1)
        for planned, column in zip(plan.batches, columns, strict=True):
            scores |= _read_scores(planned, column)
    return [scores[question] for question in range(plan.n_questions)]


def score_targets(
    lm: EditableLM,
    pairs: Iterable[tuple[str, str]],
    *,
    token_budget: int = 8192,
    target_tok: str = "in_context",
) -> list[TargetScore]:
    """Score (prompt, target) pairs with the model as it stands; equal pairs are computed once."""
    plan = plan_scoring(
        lm, [Question(prompt, target) for prompt, target in pairs], token_budget=token_budget, target_tok=target_tok
    )
    return run_scoring(lm, plan)


def _shared_rows(inputs: Sequence[tuple[int, ...]], settings: Sequence[tuple[int, int]]) -> list[_Row]:
    """One row per input that is not a prefix of another one of the same setting.

    settings: (subject position or -1, prompt length); edits may act by either, so rows that differ in them stay apart.
    """
    # In lexicographic order a prefix stands directly before its extensions: walking backwards meets the longest first.
    order = sorted(range(len(inputs)), key=lambda i: (settings[i], inputs[i]), reverse=True)
    rows: list[_Row] = []
    for i in order:
        last = rows[-1] if rows else None
        if last is not None and last.setting == settings[i] and last.ids[: len(inputs[i])] == inputs[i]:
            last.askers.append(i)
        else:
            rows.append(_Row(inputs[i], settings[i], [i]))
    return rows


def _or_minus_one(position: int | None) -> int:
    return -1 if position is None else position


def _groups_by_length(rows: Sequence[_Row], token_budget: int) -> list[list[_Row]]:
    """Batches of similar length: a row joins the batch before it unless that exceeds the budget or pads too much."""
    groups: list[list[_Row]] = []
    for row in sorted(rows, key=lambda r: (len(r.ids), r.ids)):
        real = sum(len(r.ids) for r in groups[-1]) + len(row.ids) if groups else 0
        padded = (len(groups[-1]) + 1) * len(row.ids) if groups else 0
        # Below a few hundred tokens a forward pass costs its launch, not its tokens: padding is free there.
        if groups and padded <= token_budget and (padded <= 512 or padded <= 1.25 * real):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _plan_batch(lm: EditableLM, rows: Sequence[_Row], answers: Sequence[Answer]) -> PlannedBatch:
    at: list[list[int]] = []
    questions: list[int] = []
    logit_rows: list[int] = []
    target_ids: list[int] = []
    offset = 0
    for row in rows:
        positions = sorted({p for asker in row.askers for p in answers[asker].positions})
        place = {p: offset + j for j, p in enumerate(positions)}
        for asker in row.askers:
            questions.append(asker)
            logit_rows += [place[p] for p in answers[asker].positions]
            target_ids += answers[asker].target_ids
        at.append(positions)
        offset += len(positions)
    return PlannedBatch(
        batch=Batch.from_rows(
            [row.ids for row in rows], prompt_lengths=[row.prompt_length for row in rows], device=lm.device
        ),
        at=at,
        subject_positions=[row.subject_position for row in rows],
        questions=questions,
        lengths=[len(answers[q].target_ids) for q in questions],
        logit_rows=torch.tensor(logit_rows),
        target_ids=torch.tensor(target_ids),
    )


def _answers(planned: PlannedBatch, logits: torch.Tensor) -> torch.Tensor:
    """[2, Σ] float64 on the logits' device: arg-max and log-probability of the target's token, target after target."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rows, targets = sent(planned.logit_rows, logits.device), sent(planned.target_ids, logits.device)
    best = logits.argmax(dim=-1)[rows]
    return torch.stack([best.double(), logits.log_softmax(dim=-1)[rows, targets].double()])


def _read_scores(planned: PlannedBatch, answers: torch.Tensor) -> Iterable[tuple[int, TargetScore]]:
    """One score per question from what `_answers` found."""
    for question, best, log_p, wanted in zip(
        planned.questions,
        answers[0].long().split(planned.lengths),
        answers[1].split(planned.lengths),
        planned.target_ids.split(planned.lengths),
        strict=True,
    ):
        nll = -float(log_p.mean())
        yield (
            question,
            TargetScore(
                hits=tuple((best == wanted).tolist()),
                argmax=tuple(best.tolist()),
                nll=nll if math.isfinite(nll) else math.inf,
            ),
        )
