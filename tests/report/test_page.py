"""The report page: self-contained, escaped, complete, and right about who is better."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from example import example_report

from rep_fast.errors import MissingDependencyError, OutputError
from rep_fast.report import Answered, MetricRow, ReportData, render, write_report
from rep_fast.report.charts import metric_label


class Outline(HTMLParser):
    """Collects ids, references and tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id" and value:
                self.ids.append(value)
            if name in ("href", "src", "xlink:href") and value:
                self.references.append(value)


@pytest.fixture(scope="module")
def page() -> str:
    return render(example_report())


def test_needs_nothing_from_outside(page):
    outline = Outline(page)
    assert all(reference.startswith(("#", "data:")) for reference in outline.references)
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_ids_are_unique_and_references_resolve(page):
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    inside = [reference[1:] for reference in outline.references if reference.startswith("#")]
    used = inside + re.findall(r"url\(#([^)]+)\)", page)
    assert set(used) <= set(outline.ids)


def test_texts_of_a_corpus_are_escaped(page):
    assert "<b>they</b>" not in page
    assert "&lt;b&gt;they&lt;/b&gt;" in page


def test_every_part_is_there(page):
    for anchor in ("edits", "metrics", "similarities", "collisions", "layers", "run"):
        assert f'id="{anchor}"' in page
    for words in ("Ada Stone Byron", "rome+rep", "prefers-color-scheme: dark", "native-avx2", "rep-fast demo", "± 0.4"):
        assert words in page


@pytest.mark.parametrize("n", [1, 24, 400])
def test_half_width_is_that_of_the_binomial_at_one_half(n):
    standard_deviation = (n * 0.5 * 0.5) ** 0.5 / n
    found = dataclasses.replace(example_report(), cases=n).half_width
    assert found == pytest.approx(100 * 1.96 * standard_deviation, rel=1e-12)


def test_a_page_is_made_without_torch():
    code = "import sys, rep_fast.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_page_says_how_far_so_few_cases_reach(page):
    assert "With 40\ncases a share may be off by 15 points (95 % binomial half-width at 50 %)." in page


def test_a_page_without_results_has_only_the_run():
    page = render(ReportData(title="empty", summary="nothing", model={"name": "none"}))
    for anchor in ("edits", "metrics", "similarities", "collisions", "layers"):
        assert f'id="{anchor}"' not in page
    assert 'id="run"' in page


def test_a_loss_is_shown_as_one(page):
    """success 99.0 → 98.8 is worse, shuffle 41 → 90 better."""
    rows = dict(re.findall(r"<tr title=\"exact match, (\w+)\">(.*?)</tr>", page, re.DOTALL))
    assert '<span class="down">-0.2</span>' in rows["success"]
    assert '<span class="up">+49.0</span>' in rows["shuffle_id"]


def test_answers_are_judged_against_what_was_wanted():
    answer = Answered("neighbour", "p", "Paris", {"plain": "Paris, in", "other": "Rome"}, "Paris")
    assert answer.is_right("plain")
    assert not answer.is_right("other")


def test_a_column_without_rep_makes_no_comparison():
    rows = (MetricRow("success", "REP", "…", {"rome": (90.0, 0.0, 10)}),)
    page = render(dataclasses.replace(example_report(), columns=("rome",), metrics=rows))
    assert "change</th>" not in page
    assert 'class="tile"' not in page


def test_is_the_same_every_time(page):
    assert render(example_report()) == page


def test_is_written_whole_or_refused(tmp_path, page):
    path = write_report(example_report(), tmp_path / "new")
    assert path == tmp_path / "new" / "index.html"
    assert path.read_text(encoding="utf-8") == page
    picture = (tmp_path / "new" / "metrics.svg").read_text(encoding="utf-8")
    assert "var(" not in picture
    ElementTree.fromstring(picture)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError):
        write_report(example_report(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*rep-fast\[demo\]"):
        render(example_report())


def test_labels_say_seen_and_unseen():
    assert metric_label("rephrase_ood") == "rephrase, unseen"
    assert metric_label("long_id") == "long, seen"
    assert metric_label("em_diff") == "em diff"
