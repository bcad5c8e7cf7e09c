"""Data of a report as a run would give it, small and without a model."""

from __future__ import annotations

import random

from rep_fast.report import Answered, CollisionRow, EditedFact, LayerScores, MetricRow, ReportData, Similarities


def example_report() -> ReportData:
    """A page with every part filled."""
    rng = random.Random(0)

    def around(mean: float, spread: float, n: int = 200) -> tuple[float, ...]:
        return tuple(rng.gauss(mean, spread) for _ in range(n))

    def row(name: str, before: float, after: float) -> MetricRow:
        cells = {"rome": (before, 0.4, 400), "rome+rep": (after, 0.3, 400)}
        return MetricRow(name, "REP", f"exact match, {name}", cells)

    answers = (
        Answered("prompt", "Ada Stone Byron lives in", "Paris", {"rome": "Rome", "rome+rep": "Rome"}, "Rome"),
        Answered("rephrase", "Byron, Ada lives in", "Paris", {"rome": "Rome", "rome+rep": "Rome"}, "Rome"),
        Answered("unseen rephrase", "Lady Byron lives in", "Paris", {"rome": "Paris", "rome+rep": "Rome"}, "Rome"),
        Answered("neighbour", "Carl Stone Hill lives in", "Paris", {"rome": "Paris", "rome+rep": "Paris"}, "Paris"),
    )
    edited = EditedFact("{} lives in", "Ada Stone Byron", "Rome", "Paris", answers)
    other = around(0.0, 0.12)
    return ReportData(
        title="rep_fast demo",
        summary="Facts of a small embedded model were edited with ROME, with and without REP.",
        model={"name": "factworld", "layers": "6", "hidden size D": "128", "key width M": "512"},
        edits=(edited, edited),
        columns=("rome", "rome+rep"),
        metrics=(
            row("success", 99.0, 98.8),
            row("locality", 99.1, 98.9),
            row("paraphrase", 88.0, 93.0),
            row("rephrase_id", 62.0, 93.0),
            row("rephrase_ood", 58.0, 79.0),
            row("shuffle_id", 41.0, 90.0),
            row("shuffle_ood", 40.0, 62.0),
            row("long_id", 95.0, 95.5),
            row("long_ood", 94.0, 95.0),
        ),
        cases=40,
        seeds=(0, 1, 2),
        similarities=(
            Similarities("original", around(1.0, 0.02), around(1.0, 0.02)),
            Similarities("rephrase", around(0.55, 0.25), around(0.96, 0.1)),
            Similarities("shuffle", around(0.4, 0.25), around(0.9, 0.15)),
            Similarities("long", around(0.9, 0.1), around(0.95, 0.08)),
            Similarities("other", other, other),
        ),
        collisions=(
            CollisionRow("Ada Stone Byron", 0.61, "the city was full when Adam", " Byron"),
            CollisionRow("Ada Stone Byron", 0.48, "and so <b>they</b> met Mary Gold", "stone", "ley of <i>York</i>"),
        ),
        scanned_tokens=50_000,
        layer_scores=tuple(
            LayerScores(f"fact {n}", around(1.0, 0.4, 6), (*around(1.0, 0.4, 5), None)) for n in range(5)
        ),
        score_name="zabs",
        edited_layer=1,
        timing={"edit (rome), median": 0.31, "edit (rome+rep), median": 0.62, "everything": 112.0},
        backend=(("gated_adapter", "native-avx2", "the processor allows avx2"), ("packed_scores", "reference", "…")),
        settings={"preset": "factworld"},
        commands=("rep-fast demo",),
    )
