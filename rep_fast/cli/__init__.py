"""The command `rep-fast`: parse, call, print. torch is imported by the commands that compute, not by the help.

Exit status: 0 done; 1 refused or failed, also where a method, metric or layer of that name is unknown; 2 a command line
that cannot be read: an option missing, malformed, or at odds with another.
"""

from __future__ import annotations

from typing import Annotated

import typer

from rep_fast import __version__
from rep_fast.cli.bench import bench
from rep_fast.cli.demo import demo
from rep_fast.cli.doctor import doctor
from rep_fast.cli.edit import edit
from rep_fast.cli.edits import app as edits_app
from rep_fast.cli.evaluate import evaluate
from rep_fast.cli.factworld import train
from rep_fast.cli.moments import moments
from rep_fast.cli.scan import scan
from rep_fast.cli.sweep import sweep
from rep_fast.cli.tables import tables
from rep_fast.cli.trace import trace

app = typer.Typer(
    name="rep-fast",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Edit facts in language models so that the edits hold under rephrasing, and see what they disturb.",
    epilog="Start with [bold]rep-fast demo[/bold]: everything on a small embedded model, in three minutes.",
)
factworld_app = typer.Typer(no_args_is_help=True, help="Small models that know a given set of facts.")


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"rep-fast {__version__}")
        raise typer.Exit


for _command in (demo, edit, evaluate, scan, trace, moments, sweep, tables, bench, doctor):
    app.command(_command.__name__)(_command)
factworld_app.command("train")(train)
app.add_typer(factworld_app, name="factworld")
app.add_typer(edits_app, name="edits")


def main() -> None:
    """Entry point of the console script."""
    app()
