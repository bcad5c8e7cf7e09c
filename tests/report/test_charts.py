"""What the pictures count, and what they are labelled with."""

from __future__ import annotations

import re

import pytest

from rep_fast.report import LayerScores, Similarities
from rep_fast.report.charts import layer_chart, similarity_charts


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of every histogram."""
    from matplotlib.axes import Axes

    seen, own = [], Axes.hist

    def hist(self, values, bins, **options):
        counts = own(self, values, bins, **options)
        seen.append((list(values), list(bins), counts[0]))
        return counts

    monkeypatch.setattr(Axes, "hist", hist)
    return seen


def test_the_edited_prompt_is_one_bar(drawn):
    """Rounding puts some ρ of the edited prompt just below 1 and some just above."""
    around_one = (1 - 1e-7, 1.0, 1 + 1e-7)
    similarity_charts([Similarities("original", around_one, around_one)])
    assert len(drawn) == 2
    for _, bins, shares in drawn:
        assert sorted(shares)[-2:] == [0.0, pytest.approx(100.0)]
        assert len(bins) == len(shares) + 1


def test_keys_outside_the_picture_are_counted_in_its_last_bars(drawn):
    similarity_charts([Similarities("rephrase", (-3.0, 7.0), (0.0, 0.0))])
    _, _, shares = drawn[0]
    assert (shares[0], shares[-1]) == (50.0, 50.0)


def test_labels_of_a_heat_map_are_whole():
    label = "Osric Oswin Rooklock of the Hill: Trondheim"
    chart = layer_chart([LayerScores(label, (1.0, 2.0), (0.5, 1.0))], "key", None)
    assert set(re.findall(r"\w+", label)) <= set(re.findall(r"\w+", chart))
    assert "…" not in chart
    long = layer_chart([LayerScores("word " * 30, (1.0, 2.0), (0.5, 1.0))], "key", None)
    assert "…" in long
