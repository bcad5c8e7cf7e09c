"""The report's pictures as inline SVG that follows the page's light or dark colours.

matplotlib draws with placeholder colours, which are then replaced by the page's CSS variables; text stays text.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from rep_fast.errors import MissingDependencyError
from rep_fast.report.data import Curves, LayerScores, MetricRow, Similarities

# placeholder colour → CSS variable of page.css
_INK, _FAINT, _PLAIN, _STRONG, _OTHER = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {_INK: "--ink", _FAINT: "--line", _PLAIN: "--plain", _STRONG: "--strong", _OTHER: "--other"}
# the light page's values of the variables, for pictures outside a page
_LIGHT = {"--ink": "#1d2430", "--line": "#dfe3e8", "--plain": "#d9822b", "--strong": "#1f7a8c", "--other": "#98a2b3"}
_LABEL_WIDTH = 26  # characters of a line
_KIND_WORDS = {
    "original": "edited prompt",
    "rephrase": "other names",
    "shuffle": "shuffled names",
    "long": "long contexts",
    "other": "other subjects",
}


def metric_chart(metrics: Sequence[MetricRow], plain: str, improved: str) -> str:
    """One line per metric: the plain editor's value, the improved column's, and the way between them."""
    rows = [row for row in metrics if plain in row.cells and improved in row.cells]
    figure, axes = _figure(4.6, 0.9 + 0.34 * len(rows))
    for place, row in enumerate(rows):
        before, after = row.cells[plain][0], row.cells[improved][0]
        axes.plot([before, after], [place, place], color=_FAINT, linewidth=3, zorder=1, solid_capstyle="round")
        axes.scatter([before], [place], color=_PLAIN, s=42, zorder=2, label=plain if place == 0 else None)
        axes.scatter([after], [place], color=_STRONG, s=42, zorder=3, label=improved if place == 0 else None)
    axes.set_yticks(range(len(rows)), [metric_label(row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("percent")
    axes.grid(axis="x", color=_FAINT, linewidth=0.6)
    _legend_above(figure, axes)
    return _as_svg(figure, "metrics")


def standalone(svg: str) -> str:
    """A chart as a file of its own: fixed colours on white, in its natural size."""
    for variable, color in _LIGHT.items():
        svg = svg.replace(f"var({variable})", color)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    attributes = f'width="{width}pt" height="{height}pt" font-family="sans-serif" style="background: #ffffff"'
    return svg.replace("<svg ", f"<svg {attributes} ", 1)


def metric_label(name: str) -> str:
    """A metric's name for people: "rephrase_ood" → "rephrase, unseen"."""
    words = {"id": "seen", "ood": "unseen"}
    stem, _, side = name.rpartition("_")
    return f"{stem}, {words[side]}" if side in words else name.replace("_", " ")


def similarity_charts(similarities: Sequence[Similarities]) -> list[tuple[str, str]]:
    """(kind in words, SVG) per kind of key: the distribution of ρ before and after REP over that of other subjects."""
    baseline = next((own.before for own in similarities if own.kind == "other"), ())
    return [
        (_KIND_WORDS[own.kind], _similarity_chart(own, baseline))
        for own in similarities
        if own.kind != "other" and own.before
    ]


def _similarity_chart(own: Similarities, baseline: Sequence[float]) -> str:
    figure, axes = _figure(4.4, 1.9)
    # the edited prompt's ρ of 1, give or take rounding, lies in the middle of a bar
    bins = [(step - 0.5) / 20 for step in range(-8, 34)]
    low, high = bins[0], bins[-1]

    def shown(values: Sequence[float]) -> tuple[list[float], list[float]]:
        # what lies outside is counted in the outermost bar, so that no key disappears
        return [min(max(value, low), high) for value in values], [100 / len(values)] * len(values)

    for values, color, kind, opacity in (
        (baseline, _OTHER, "step", 1.0),
        (own.before, _PLAIN, "stepfilled", 0.62),
        (own.after, _STRONG, "stepfilled", 0.62),
    ):
        if values:
            clipped, weights = shown(values)
            axes.hist(clipped, bins, weights=weights, histtype=kind, color=color, alpha=opacity)
    axes.axvline(1.0, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xlim(low, high)
    axes.set_xlabel("response ρ")
    axes.set_ylabel("% of keys")
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    return _as_svg(figure, f"similarity-{own.kind}")


def sweep_charts(curves: Curves) -> list[tuple[str, str]]:
    """(title, SVG) of a sweep: what should hold (success, paraphrases, locality), and the subject's other forms."""
    perturbed = [name for name in curves.series if name.endswith(("_id", "_ood"))]
    others = [name for name in curves.series if name not in perturbed]
    parts = (("the edit and its neighbours", others), ("the subject's other forms", perturbed))
    return [(title, _sweep_chart(curves, names, number)) for number, (title, names) in enumerate(parts) if names]


def _sweep_chart(curves: Curves, names: Sequence[str], number: int) -> str:
    figure, axes = _figure(4.6, 2.9)
    places = range(len(curves.values))
    colors, styles, marks = (_STRONG, _PLAIN, _OTHER), ("-", (0, (4, 2))), "osD^vP"
    for place, name in enumerate(names):
        # the unseen side of a pair is dashed in the colour of the seen one
        pair = place // 2 if name.endswith(("_id", "_ood")) else place
        style = styles[name.endswith("_ood")]
        heights = [math.nan if value is None else value for value in curves.series[name]]
        color, mark = colors[pair % len(colors)], marks[pair % len(marks)]
        axes.plot(
            places, heights, color=color, linestyle=style, marker=mark, markersize=4, linewidth=1.4,
            label=metric_label(name),
        )  # fmt: skip
    axes.set_xticks(list(places), list(curves.values))
    axes.set_xlabel(curves.name)
    axes.set_ylabel("percent")
    axes.set_ylim(-2, 102)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    _legend_above(figure, axes, columns=3)
    return _as_svg(figure, f"sweep-{re.sub(r'[^a-z0-9]+', '-', curves.name.lower())}-{number}")


def layer_chart(layers: Sequence[LayerScores], part: str, edited_layer: int | None) -> str:
    """Heat map, facts × layers, of one part ("key" or "value"); each fact is scaled to its own largest score."""
    import numpy as np

    rows = [[np.nan if score is None else score for score in getattr(own, part)] for own in layers]
    scores = np.array(rows, dtype=float)
    scaled = scores / np.maximum(np.nanmax(np.abs(scores), axis=1, keepdims=True), 1e-30)
    figure, axes = _figure(5.0, 0.95 + 0.36 * len(layers))
    mesh = axes.pcolormesh(scaled, cmap="viridis", vmin=0, vmax=1, edgecolor="none")
    axes.set_yticks([place + 0.5 for place in range(len(layers))], [_in_lines(own.label) for own in layers])
    axes.invert_yaxis()
    step = max(1, scores.shape[1] // 12)
    ticks = range(0, scores.shape[1], step)
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("layer" if edited_layer is None else f"layer (edited: {edited_layer})")
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_ticks([0, 0.5, 1])
    bar.ax.tick_params(labelsize=9, length=0)
    return _as_svg(figure, f"layers-{part}")


def _in_lines(label: str) -> str:
    """A label in two short lines; what does not fit there is cut and says so."""
    return textwrap.fill(label, _LABEL_WIDTH, max_lines=2, placeholder=" …")


def _legend_above(figure: Any, axes: Any, *, columns: int | None = None) -> None:
    columns = columns or len(axes.get_legend_handles_labels()[0])
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, handlelength=1.0, columnspacing=1.0)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of its own: nothing here touches pyplot, which keeps figures in a global list."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            'the report needs matplotlib; install it with pip install "rep-fast[demo]"'
        ) from None
    with rc_context({"font.size": 9, "font.family": "sans-serif", "text.color": _INK}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, length=0)
    axes.set_axisbelow(True)
    return figure, axes


def _as_svg(figure: Any, name: str) -> str:
    """The figure as an SVG element without size, its colours as CSS variables and its ids made unique by `name`."""
    from matplotlib import rc_context

    out = io.StringIO()
    _paint_text(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    for pattern, replacement in (
        (r'(<svg[^>]*?) width="[^"]*"', r"\1"),
        (r'(<svg[^>]*?) height="[^"]*"', r"\1"),
        (r"<metadata>.*?</metadata>", ""),
        (r"<style type.*?</style>", ""),  # its rules would hold for the whole page
        (r"font-family: [^;\"]*", "font-family: inherit"),
        (r'id="([^"]+)"', rf'id="{name}-\1"'),
        (r'(href="#|url\(#)', rf"\g<1>{name}-"),
    ):
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    return svg


def _paint_text(figure: Any) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_color(_INK)
