"""The report: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from rep_fast.errors import MissingDependencyError
from rep_fast.report import charts
from rep_fast.report.data import ReportData
from rep_fast.report.paper_tables import MEASURED, PaperTable
from rep_fast.safe_files import write_atomically

# what the tiles at the top show, where the run has it
_HEADLINES = ("success", "rephrase_ood", "shuffle_ood", "long_ood", "locality")
_MOVED = 0.05


def write_report(data: ReportData, directory: str | Path) -> Path:
    """Write `index.html` into a directory and return its path; where columns are compared, `metrics.svg` beside it.

    The page needs no other file; the picture is for pages elsewhere.

    Raises:
        OutputError: it cannot be written. MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    path = Path(directory) / "index.html"
    write_atomically(path, render(data).encode("utf-8"))
    compared = _compared(data)
    if compared["improved"] and data.metrics:
        picture = charts.metric_chart(data.metrics, compared["plain"], compared["improved"])
        write_atomically(path.with_name("metrics.svg"), charts.standalone(picture).encode("utf-8"))
    return path


def render(data: ReportData) -> str:
    """The page as HTML; texts of facts and corpora are escaped.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    template, css = _template("page.html.j2")
    return template.render(
        data=data,
        css=css,
        label=charts.metric_label,
        duration=_duration,
        before_slot=lambda prompt: prompt.split("{}")[0],
        after_slot=lambda prompt: prompt.split("{}")[1],
        **_compared(data),
        **_pictures(data),
        contents=_contents(data),
    )


def render_table(table: PaperTable, *, title: str = "Results beside the papers' tables") -> str:
    """A table of runs and printed rows as one HTML page without outside references.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    template, css = _template("tables.html.j2")
    return template.render(table=table, title=title, css=css, measured=MEASURED)


def _template(name: str) -> tuple[Any, Any]:
    """A template of this room and the style sheet, ready to be filled in."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise MissingDependencyError('the report needs jinja2; install it with pip install "rep-fast[demo]"') from None
    from markupsafe import Markup

    room = resources.files("rep_fast.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((room / name).read_text(encoding="utf-8"))
    return template, Markup((room / "page.css").read_text(encoding="utf-8"))


def _compared(data: ReportData) -> dict[str, Any]:
    """The plain editor's column and the one to set against it, with the tiles that compare them."""
    plain = data.columns[0] if data.columns else ""
    improved = next((name for name in data.columns if name.startswith(f"{plain}+")), "")
    by_name = {row.name: row for row in data.metrics}
    tiles = [
        {"what": charts.metric_label(name), "plain": by_name[name].cells[plain][0], "improved": cells[improved][0]}
        for name in _HEADLINES
        if improved and name in by_name and {plain, improved} <= (cells := by_name[name].cells).keys()
    ]
    return {"plain": plain, "improved": improved, "tiles": tiles}


def _pictures(data: ReportData) -> dict[str, Any]:
    compared = _compared(data)
    others = next((own for own in data.similarities if own.kind == "other"), None)
    moved = None
    if others is not None and others.before:
        changes = [abs(b - a) for b, a in zip(others.before, others.after, strict=True)]
        moved = 100 * sum(change > _MOVED for change in changes) / len(changes)
    has_both = compared["improved"] and data.metrics
    return {
        "metric_chart": charts.metric_chart(data.metrics, compared["plain"], compared["improved"]) if has_both else "",
        "similarity_charts": charts.similarity_charts(data.similarities),
        "others_moved": moved,
        "n_others": len(others.before) if others is not None else 0,
        "key_layers": charts.layer_chart(data.layer_scores, "key", data.edited_layer) if data.layer_scores else "",
        "sweeps": [(own, charts.sweep_charts(own)) for own in data.curves],
        "value_layers": charts.layer_chart(data.layer_scores, "value", data.edited_layer) if data.layer_scores else "",
    }


def _contents(data: ReportData) -> list[tuple[str, str]]:
    parts = (
        ("edits", "Edits", data.edits),
        ("metrics", "Metrics", data.metrics),
        ("sweeps", "Sweeps", data.curves),
        ("similarities", "Similarities", data.similarities),
        ("collisions", "Collisions", data.collisions),
        ("layers", "Layers", data.layer_scores),
        ("run", "This run", True),
    )
    return [(anchor, words) for anchor, words, present in parts if present]


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
