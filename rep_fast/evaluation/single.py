"""The single-edit regime: edit, evaluate, undo exactly, for every seed, case and column (methods §10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rep_fast.edits import Edit
from rep_fast.evaluation.engine import evaluate_regime
from rep_fast.evaluation.protocol import DEFAULT_PROTOCOL, Protocol
from rep_fast.evaluation.regime import Regime
from rep_fast.evaluation.stacking import Progress, WriteStep
from rep_fast.evaluation.summary import Summary
from rep_fast.facts import EditCase, TextSource
from rep_fast.models import EditableLM

BuildEdit = Callable[[EditCase, int], Edit]


def evaluate_single(
    lm: EditableLM,
    cases: Sequence[EditCase],
    columns: Mapping[str, BuildEdit],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    text: TextSource | None = None,
    out_dir: str | Path | None = None,
    resume: bool = False,
    settings: Mapping[str, Any] | None = None,
    ceiling_of: str | None = None,
    protocol: Protocol = DEFAULT_PROTOCOL,
    references: Mapping[str, Sequence[str]] | None = None,
    token_budget: int = 8192,
    progress: Progress | None = None,
) -> Summary:
    """Evaluate editors one case at a time, each on the unedited model: groups of one record.

    Args:
        columns: name → function (case, seed) → Edit; called in order for each seed and case, so that later columns may
            build on what an earlier one made for the same case.
        Others: see `evaluate_regime`.
    Returns, Raises: see `evaluate_regime`.
    """
    return evaluate_regime(
        lm,
        cases,
        {name: one_by_one(build) for name, build in columns.items()},
        regime=Regime.single(),
        seeds=seeds,
        text=text,
        out_dir=out_dir,
        resume=resume,
        settings=settings,
        ceiling_of=ceiling_of,
        protocol=protocol,
        references=references,
        token_budget=token_budget,
        progress=progress,
    )


def one_by_one(build: BuildEdit) -> WriteStep:
    """A column of single edits as a column of steps; it edits the model as it stands and looks at nothing else."""

    def write(cases: Sequence[EditCase], seed: int, active: Sequence[Edit]) -> Edit:
        (case,) = cases
        return build(case, seed)

    return write
