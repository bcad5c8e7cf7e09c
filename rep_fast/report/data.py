"""What a report page shows, as plain data: no model, no tensors, nothing that needs torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answered:
    """What the model says to one prompt before the edit and under each version of it.

    Attributes:
        kind: "prompt", "paraphrase", "rephrase", "unseen rephrase", "shuffle" or "neighbour".
        prompt: the full prompt.
        before: the unedited model's continuation.
        after: column ("rome", "rome+rep" …) → continuation under the edit.
        wanted: what it should be afterwards: the new target, for a neighbour the old answer.
    """

    kind: str
    prompt: str
    before: str
    after: Mapping[str, str]
    wanted: str

    def is_right(self, column: str) -> bool:
        """Whether the continuation under `column` starts with what was wanted."""
        return self.after[column].startswith(self.wanted)


@dataclass(frozen=True)
class EditedFact:
    """One edit with the model's answers; `target_true` is "" where it is unknown."""

    prompt: str
    subject: str
    target_new: str
    target_true: str
    answers: tuple[Answered, ...]


@dataclass(frozen=True)
class MetricRow:
    """One metric over all columns, in percent: column → (mean, standard deviation over seeds, number of prompts)."""

    name: str
    protocol: str
    meaning: str
    cells: Mapping[str, tuple[float, float, int]]


@dataclass(frozen=True)
class Similarities:
    """Response ρ of keys to an edit (1 = all of the edit is retrieved), before and after the adapter.

    kind: "original", "rephrase", "shuffle", "long" (same subject) or "other" (other subjects, the baseline).
    """

    kind: str
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class CollisionRow:
    """A corpus place that an edit of `subject` would also answer to; `prefix`, `token` and `following` are one text."""

    subject: str
    rho: float
    prefix: str
    token: str
    following: str = ""


@dataclass(frozen=True)
class LayerScores:
    """Mean path score of the best nodes of each layer for one fact; None where a layer has no selected node."""

    label: str
    key: tuple[float | None, ...]
    value: tuple[float | None, ...]


@dataclass(frozen=True)
class Curves:
    """Metrics, in percent, over the values of one hyper-parameter; None where a value lacks the metric."""

    name: str
    values: tuple[str, ...]
    series: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class ReportData:
    """Everything on the page; empty parts are left out of it.

    Attributes:
        title, summary: heading and the sentence under it.
        model: what the model is, label → text.
        columns: names of the evaluated columns, the plain editor first.
        cases, seeds: what the metrics were measured on.
        curves: sweeps.
        scanned_tokens: size of the corpus behind the collisions. score_name: of the path scores.
        timing: label → seconds.
        backend: (op, body, reason).
        settings: label → text, printed small at the end.
        commands: how to reproduce the page.
        warnings: sentences a reader must know.
    """

    title: str
    summary: str
    model: Mapping[str, str]
    edits: tuple[EditedFact, ...] = ()
    columns: tuple[str, ...] = ()
    metrics: tuple[MetricRow, ...] = ()
    cases: int = 0
    seeds: tuple[int, ...] = ()
    similarities: tuple[Similarities, ...] = ()
    collisions: tuple[CollisionRow, ...] = ()
    scanned_tokens: int = 0
    layer_scores: tuple[LayerScores, ...] = ()
    curves: tuple[Curves, ...] = ()
    score_name: str = ""
    edited_layer: int | None = None
    timing: Mapping[str, float] = field(default_factory=dict)
    backend: tuple[tuple[str, str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of a share among the cases, in points, where it is widest: 196 √(¼ / n).

        Cases count, not prompts: those of one case stand or fall together. Infinite without cases.
        """
        return 98.0 / math.sqrt(self.cases) if self.cases else math.inf
