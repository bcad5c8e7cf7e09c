"""README's table of speeds, written from the CSV files that `rep-fast bench OP --csv` leaves in results/.

    python benchmarks/performance_table.py

rewrites what stands between the two marks in README.md; a test holds README to what this script makes of the files.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
BEGIN = "<!-- speed: begin (python benchmarks/performance_table.py) -->"
END = "<!-- speed: end -->"


_CEILINGS = (("float32", "fp32"), ("bfloat16", "bf16"), ("int8", "int8"))


@dataclass(frozen=True)
class Line:
    """A row of the table: the case of an op, and, where ours has several modes, which of them."""

    op: str
    case: str
    what: str
    mode: str = ""


LINES = (
    Line("whitened_topk", "m4096-400", "collision scan, 400 subjects, M 4096"),
    Line("whitened_topk", "llama2-7b-400", "collision scan, 400 subjects, M 11008"),
    Line("gated_adapter", "llama2-7b-1", "12 gates of one token, M 11008"),
    Line("gated_adapter", "llama2-7b-16", "6 gates of 16 tokens, M 11008"),
    Line("accumulate_moment", "m4096", "second moment, M 4096"),
    Line("accumulate_moment", "llama2-7b", "second moment, M 11008"),
    Line("spd_solver", "m4096-factor+solve", "factor C and solve, M 4096, 100 columns", "auto"),
    Line("spd_solver", "llama2-7b-factor+solve", "factor C and solve, M 11008, 100 columns", "auto"),
    Line("spd_solver", "m4096-solve", "solve with a kept factor, float32 accuracy, M 4096", "factor alone"),
    Line("packed_scores", "llama2-7b-16", "node scores, 16 tokens, D 4096, M 11008"),
    Line("packed_scores", "llama2-7b-64", "node scores, 64 tokens, D 4096, M 11008"),
)


def rows_of(op: str, results: Path) -> list[dict[str, str]]:
    """Rows of an op's file, none where it was not measured."""
    path = results / f"{op}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def table(results: Path = HERE / "results") -> str:
    """The table and what it was measured on, in Markdown."""
    head = (
        "| what | ours | fastest other way to the same result | times as fast | of the ceiling |\n|---|---|---|---|---|"
    )
    lines, machines = [head], {}
    for line in LINES:
        rows = [row for row in rows_of(line.op, results) if row["case"] == line.case]
        if not rows:
            continue
        lines.append(_shown(line, rows))
        machines[rows[0]["cpu"]] = rows[0]
    for cpu, row in machines.items():
        threads = "one thread" if row["threads"] == "1" else f"{row['threads']} threads"
        rates = ", ".join(f"{name} {float(row[f'ceiling_{key}']):.0f}" for name, key in _CEILINGS)
        lines.append(
            f"\n{cpu}, {threads}; bare instructions reach {rates} Gop/s (shares are of what they reached in the same"
            f" rounds). Medians are divided; peers of the scan exclude nothing. {row['versions']}."
        )
    return "\n".join([*lines, *gpu_lines(results)])


def gpu_lines(results: Path) -> list[str]:
    """The newest results of gpu_check.py as a table of their own; nothing while there are none."""
    files = sorted(results.glob("gpu-*.csv"), key=lambda path: path.stem[-10:])  # by the date
    if not files:
        return []
    with files[-1].open() as file:
        rows = list(csv.DictReader(file))
    lines = ["\n| on a GPU | value | torch | times as fast | of the ceiling |\n|---|---|---|---|---|"]
    for row in rows:
        value, peer, share = (float(row[name]) if row[name] else None for name in ("value", "peer", "share"))
        shown = [f"{value:.4g} {row['unit']}", "–", "–", "–" if share is None else f"{100 * share:.0f} %"]
        if peer is not None and value:
            shown[1:3] = [f"{peer:.4g} {row['unit']}", f"{peer / value:.2f}"]
        lines.append(f"| `{row['stage']}`: {row['case']} | {' | '.join(shown)} |")
    about = rows[0]
    return [*lines, f"\n{about['gpu']}, torch {about['torch']}, commit {about['commit']}."]


def _shown(line: Line, rows: list[dict[str, str]]) -> str:
    ours = [row for row in rows if row["provider"].startswith("rep_fast") and row["provider"].endswith(line.mode)]
    peers = [row for row in rows if not row["provider"].startswith("rep_fast")]
    exact = [row for row in peers if row["exact"] == "True"]
    best, peer = (min(those, key=lambda row: float(row["median_s"])) for those in (ours, exact or peers))
    share = best["share_of_ceiling"]
    remark = "" if exact else ", inexact" if best["exact"] == "True" else ", as inexact"
    cells = (
        f"`{line.op}`: {line.what}",
        f"{_time(best)} ({best['provider'].removeprefix('rep_fast ')})",
        f"{_time(peer)} ({peer['provider']}{remark})",
        f"{float(peer['median_s']) / float(best['median_s']):.2f}",
        f"{100 * float(share):.0f} %" if share else "–",
    )
    return f"| {' | '.join(cells)} |"


def _time(row: dict[str, str]) -> str:
    seconds = float(row["median_s"])
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def with_table(readme: str, made: str) -> str:
    """README with `made` between the marks."""
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(), table()))
