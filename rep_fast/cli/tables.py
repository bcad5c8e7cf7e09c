"""`rep-fast tables`: finished runs in the layout of the papers' tables, the printed rows beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from rep_fast.cli.options import DebugOption, JsonOption, names
from rep_fast.cli.screen import opened
from rep_fast.cli.writable import check_file
from rep_fast.safe_files import write_atomically


def tables(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Directories of rep-fast evaluate --out.")],
    layout: Annotated[
        str | None, typer.Option("--layout", help="rep or path; default: what fits how the edits were made.")
    ] = None,
    published: Annotated[
        str, typer.Option("--published", metavar="NAMES", help="fitting, none, or printed tables by name.")
    ] = "fitting",
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write the rows as CSV.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show finished runs as the papers print theirs, the printed rows beside them."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.report import paper_table, read_run, render_table
        from rep_fast.report.paper_tables import fitting_layout, fitting_tables
        from rep_fast.report.published import published_names, published_table

        for path, option in ((csv, "--csv"), (html, "--html")):
            if path is not None:
                check_file(path, option)
        found = [read_run(run) for run in runs]
        chosen = layout or fitting_layout(found)
        if published == "fitting":
            printed = fitting_tables(found, chosen, map(published_table, published_names()))
        else:
            printed = [published_table(name) for name in names(published) if name != "none"]
        table = paper_table(found, printed, layout=chosen)
        screen.show(table.to_rich())
        for note in table.footnotes:
            screen.show(f"  [dim]{escape(note)}[/dim]")
        for path, content in ((csv, table.to_csv), (html, lambda: render_table(table))):
            if path is not None:
                write_atomically(path, content().encode("utf-8"))
                screen.show(f"written to {path}")
        screen.answer(table.to_dict())
