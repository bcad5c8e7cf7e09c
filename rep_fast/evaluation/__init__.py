"""Evaluation: teacher-forced scoring, metrics that carry their protocol, regimes, resumable runs (methods §9–10)."""

from __future__ import annotations

from rep_fast.evaluation.metrics import METRICS, PROTOCOL_OF, Metric, measure
from rep_fast.evaluation.oracle import oracle_patch
from rep_fast.evaluation.questions import CaseQuestion, case_questions
from rep_fast.evaluation.records import CaseRecord, PromptScore
from rep_fast.evaluation.run_directory import RunDirectory
from rep_fast.evaluation.scoring import Question, TargetScore, plan_scoring, run_scoring, score_targets
from rep_fast.evaluation.single import Protocol, cases_digest, evaluate_single, perturb_case
from rep_fast.evaluation.summary import MAIN_METRICS, Cell, Spread, Summary

__all__ = [
    "MAIN_METRICS",
    "METRICS",
    "PROTOCOL_OF",
    "CaseQuestion",
    "CaseRecord",
    "Cell",
    "Metric",
    "PromptScore",
    "Protocol",
    "Question",
    "RunDirectory",
    "Spread",
    "Summary",
    "TargetScore",
    "case_questions",
    "cases_digest",
    "evaluate_single",
    "measure",
    "oracle_patch",
    "perturb_case",
    "plan_scoring",
    "run_scoring",
    "score_targets",
]
