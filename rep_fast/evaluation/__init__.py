"""Evaluation: teacher-forced scoring, metrics that carry their protocol, regimes, resumable runs (methods §9–10)."""

from __future__ import annotations

from rep_fast.evaluation.contradictions import check_contradictions
from rep_fast.evaluation.engine import cases_digest, check_ceiling, evaluate_regime
from rep_fast.evaluation.fluency import read_references
from rep_fast.evaluation.metrics import GENERATED, METRICS, PROTOCOL_OF, Metric, measure
from rep_fast.evaluation.oracle import oracle_patch
from rep_fast.evaluation.protocol import Protocol, perturb_case
from rep_fast.evaluation.questions import CaseQuestion, case_questions
from rep_fast.evaluation.records import CaseRecord, GeneratedText, PromptScore
from rep_fast.evaluation.regime import Regime
from rep_fast.evaluation.run_directory import RunDirectory
from rep_fast.evaluation.scoring import Question, TargetScore, plan_scoring, run_scoring, score_targets
from rep_fast.evaluation.single import BuildEdit, evaluate_single, one_by_one
from rep_fast.evaluation.stacking import WriteStep
from rep_fast.evaluation.summary import MAIN_METRICS, Cell, Spread, Summary
from rep_fast.evaluation.transform import Transform

__all__ = [
    "GENERATED",
    "MAIN_METRICS",
    "METRICS",
    "PROTOCOL_OF",
    "BuildEdit",
    "CaseQuestion",
    "CaseRecord",
    "Cell",
    "GeneratedText",
    "Metric",
    "PromptScore",
    "Protocol",
    "Question",
    "Regime",
    "RunDirectory",
    "Spread",
    "Summary",
    "TargetScore",
    "Transform",
    "WriteStep",
    "case_questions",
    "cases_digest",
    "check_ceiling",
    "check_contradictions",
    "evaluate_regime",
    "evaluate_single",
    "measure",
    "one_by_one",
    "oracle_patch",
    "perturb_case",
    "plan_scoring",
    "read_references",
    "run_scoring",
    "score_targets",
]
