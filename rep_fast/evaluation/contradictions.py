"""Records that one edit cannot both write: the same words about the same subject, two targets."""

from __future__ import annotations

from collections.abc import Sequence

from rep_fast.errors import RecordError
from rep_fast.evaluation.regime import Regime
from rep_fast.facts import EditCase


def check_contradictions(cases: Sequence[EditCase], regime: Regime) -> None:
    """Look through the records of each edit of a regime, in the order given.

    Raises:
        RecordError: two of them contradict each other; named by case_id.
    """
    for group in regime.groups(cases):
        for step in regime.steps(group):
            _check_step(step)


def _check_step(step: Sequence[EditCase]) -> None:
    said: dict[tuple[str, str], EditCase] = {}
    for case in step:
        fact = case.fact
        other = said.setdefault((fact.prompt, fact.subject), case)
        if other.fact.target_new != fact.target_new:
            raise RecordError(
                f"cases {other.case_id} and {case.case_id} contradict each other in one edit: {fact.text!r} cannot be "
                f"both {other.fact.target_new!r} and {fact.target_new!r}; leave one out, or take both with "
                "--allow-conflicts"
            )
