"""`rep-fast bench`: the ops beside their peers on this machine, and what the machine can do at most."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rep_fast.cli.options import DebugOption, JsonOption, names
from rep_fast.cli.screen import Screen, opened
from rep_fast.cli.writable import check_file
from rep_fast.errors import HparamError

if TYPE_CHECKING:
    from rep_fast.bench import Ceilings, Row

_WHAT = ("ceilings", "accumulate_moment", "gated_adapter", "packed_scores", "spd_solver", "whitened_topk")


def bench(
    what: Annotated[str, typer.Argument(help=f"What to measure: {', '.join(_WHAT)}.")] = "ceilings",
    cases: Annotated[str | None, typer.Option("--cases", help="Names of cases, by comma; default: all.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each provider runs, in turn.")] = 7,
    seed: Annotated[int, typer.Option("--seed", help="Of the random inputs.")] = 0,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the rows there.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure kernels beside their peers, run in turn in one process, as shares of what this machine can do."""
    if what == "ceilings" and (cases is not None or csv is not None):
        raise typer.BadParameter("--cases and --csv go with an op, not with ceilings", param_hint="WHAT")
    with opened(as_json=as_json, debug=debug) as screen:
        if what not in _WHAT:
            raise HparamError(f"there is nothing called {what!r} to measure; choose from {', '.join(_WHAT)}")

        import torch

        if csv is not None:
            check_file(csv, "--csv")

        from rep_fast.bench import Ceilings

        torch.set_num_threads(threads)
        ceilings = [Ceilings.measure(threads=threads, level=level) for level in _levels()]
        if what == "ceilings":
            screen.show(_ceilings_table(ceilings))
            screen.answer({"ceilings": [found.to_dict() for found in ceilings]})
            return
        rows = _measure(screen, what, cases, rounds=rounds, seed=seed)
        if csv is not None:
            _write(csv, rows, ceilings[-1])
            screen.show(f"rows are in {csv}")
        answer = {"ceilings": [found.to_dict() for found in ceilings], "rows": [row.to_dict() for row in rows]}
        screen.answer(answer)


def _measure(screen: Screen, op: str, chosen: str | None, *, rounds: int, seed: int) -> list[Row]:
    from rep_fast.bench import OPS, measure

    module = OPS[op]
    wanted = names(chosen or ",".join(case.name for case in module.CASES))
    known = {case.name: case for case in module.CASES}
    for name in wanted:
        if name not in known:
            raise HparamError(f"case {name!r} of {op} is unknown; choose from {', '.join(known)}")
    rows = []
    for name in wanted:
        case = known[name]
        inputs = module.Inputs.draw(case, seed=seed)
        found = measure(
            op, name, module.providers(inputs), operations=case.operations, is_exact=inputs.is_exact, rounds=rounds,
            progress=partial(screen.progress, name),
        )  # fmt: skip
        screen.show(_rows_table(name, found))
        rows += found
    return rows


def _levels() -> list[str]:
    from rep_fast.ops import native

    module = native.find().module
    # without a native module Ceilings.measure says what to do
    return [""] if module is None else native.levels(module)


def _write(path: Path, rows: list[Row], ceilings: Ceilings) -> None:
    from rep_fast.bench import about_this_machine, write_csv

    rates = {f"ceiling_{name}": f"{getattr(ceilings, name):.4g}" for name in ("fp32", "bf16", "int8", "read", "copy")}
    write_csv(path, rows, {**about_this_machine(), **rates})


def _ceilings_table(ceilings: list[Ceilings]) -> Table:
    table = Table(title=f"Ceilings of this machine, {ceilings[0].threads} thread(s)")
    for column in ("level", "fp32 Gop/s", "bf16 Gop/s", "int8 Gop/s", "read GB/s", "copy GB/s"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for found in ceilings:
        rates = (found.fp32, found.bf16, found.int8, found.read, found.copy)
        table.add_row(found.level, *(f"{rate:.0f}" if rate else "–" for rate in rates))
    return table


def _rows_table(case: str, rows: list[Row]) -> Table:
    table = Table(title=case)
    for column in ("provider", "median ms", "20–80 %", "Gop/s", "of ceiling", "to best peer", "extra MB", "exact"):
        table.add_column(column, justify="left" if column == "provider" else "right")
    for row in rows:
        table.add_row(
            row.provider,
            f"{1e3 * row.median_s:.1f}",
            f"{1e3 * row.q20_s:.1f}–{1e3 * row.q80_s:.1f}",
            f"{row.gops:.1f}",
            "–" if row.share_of_ceiling is None else f"{100 * row.share_of_ceiling:.0f} %",
            "–" if row.ratio_to_best_peer is None else f"{row.ratio_to_best_peer:.2f}×",
            f"{row.peak_extra_mb:.0f}",
            "yes" if row.exact else "no",
        )
    return table
