"""`rep-fast sweep`: how results depend on one hyper-parameter."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rep_fast.cli.evaluate import as_json_object
from rep_fast.cli.opening import Stopwatch, choose_cases, open_model, open_workbench
from rep_fast.cli.options import (
    CasesOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    LimitOption,
    ModelOption,
    MomentsOption,
    PresetOption,
    SetOption,
    SkipBadOption,
    TextOption,
    names,
    numbers,
    one_layer,
    settings,
)
from rep_fast.cli.screen import opened
from rep_fast.cli.writable import check_directory

if TYPE_CHECKING:
    from rep_fast.analysis import Sweep
    from rep_fast.api import Workbench
    from rep_fast.report import ReportData


def sweep(
    model: ModelOption,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Hyper-parameter of the editor or of REP.")],
    values: Annotated[str, typer.Option("--values", metavar="V", help="Its values, separated by commas.")],
    method: Annotated[str, typer.Option("--method", help="Editor.")] = "rome",
    rep: Annotated[bool, typer.Option("--rep", help="With REP's adapter.")] = False,
    rep_objective: Annotated[
        str | None, typer.Option("--rep-objective", help="paper or calibrated; implies --rep.")
    ] = None,
    cases: CasesOption = None,
    split: Annotated[
        str, typer.Option("--split", help="Without --cases: the model's own records, validation or test.")
    ] = "validation",
    limit: LimitOption = None,
    skip_bad: SkipBadOption = False,
    layers: LayersOption = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="S", help="Seeds, separated by commas.")] = "0",
    text: TextOption = None,
    moments: MomentsOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep every result and write a page with curves.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in --out.")] = False,
    preset: PresetOption = None,
    set_: SetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Evaluate at several values of one hyper-parameter, on validation records, where settings are to be chosen."""
    layer, overrides, chosen_seeds = one_layer(layers), settings(set_), numbers(seeds, "--seeds")
    if resume and out is None:
        raise typer.BadParameter("needs --out with the sweep's directory", param_hint="--resume")
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.analysis.sweeps import sweep as run_sweep
        from rep_fast.evaluation import Protocol
        from rep_fast.report import write_report

        if out is not None:
            check_directory(out)
        watch = Stopwatch()
        lm = open_model(model, device=device, dtype=dtype)
        chosen = choose_cases(screen, lm, cases, split=split, limit=limit, skip_bad=skip_bad)
        bench = open_workbench(screen, lm, text=text, preset=preset, overrides=overrides, layer=layer, moments=moments)
        found = run_sweep(
            bench,
            chosen,
            method=method,
            name=name,
            values=names(values),
            objective=rep_objective or (True if rep else None),
            seeds=chosen_seeds,
            text=bench.context_text,
            protocol=Protocol.of_preset(bench.preset),
            out_dir=out,
            resume=resume,
            progress=lambda done, total: screen.progress("sweep", done, total),
        )
        watch.lap("sweep")
        screen.show(found.summary.table())
        answer = as_json_object(model, len(chosen), chosen_seeds, found.summary, watch)
        if out is not None:
            page = write_report(_page(bench, found, method, len(chosen), chosen_seeds), out)
            screen.show(f"every result is in {out}; open {page} in a browser for the curves")
            answer["report"] = str(page)
        screen.answer({**answer, "name": name, "values": list(found.values)})


def _page(bench: Workbench, found: Sweep, method: str, n_cases: int, seeds: list[int]) -> ReportData:
    from rep_fast.report import ReportData
    from rep_fast.report.gathering import model_description, sweep_curves

    return ReportData(
        title=f"Sweep of {found.name}",
        summary=f"{n_cases} records of {bench.lm.name} were edited with {method} at {len(found.values)} values of "
        f"{found.name}, each on the clean model.",
        model=model_description(bench.lm, bench.layers(method)),
        cases=n_cases,
        seeds=tuple(seeds),
        curves=(sweep_curves(found),),
        settings=found.summary.settings["hparams"],
        commands=(shlex.join(["rep-fast", *sys.argv[1:]]),),
    )
