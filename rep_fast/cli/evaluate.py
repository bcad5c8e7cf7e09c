"""`rep-fast evaluate`: how well edits hold over many records, with and without REP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rep_fast.cli.opening import Stopwatch, backend_names, choose_cases, open_model, open_workbench
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
    SplitOption,
    TextOption,
    names,
    numbers,
    one_layer,
    settings,
)
from rep_fast.cli.screen import Screen, opened
from rep_fast.cli.writable import check_directory

if TYPE_CHECKING:
    from rep_fast.evaluation import Summary


def evaluate(
    model: ModelOption,
    cases: CasesOption = None,
    split: SplitOption = "test",
    limit: LimitOption = None,
    skip_bad: SkipBadOption = False,
    method: Annotated[str, typer.Option("--method", help="Editors, separated by commas.")] = "rome",
    rep: Annotated[bool, typer.Option("--rep", help="Add a column with REP to each method.")] = False,
    rep_objective: Annotated[
        str | None, typer.Option("--rep-objective", help="paper or calibrated (or both, by comma); implies --rep.")
    ] = None,
    layers: LayersOption = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="S", help="Seeds, separated by commas.")] = "0",
    seed: Annotated[int | None, typer.Option("--seed", help="Short for --seeds with one.")] = None,
    text: TextOption = None,
    moments: MomentsOption = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Keep every result; can be resumed.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    preset: PresetOption = None,
    set_: SetOption = None,
    ceiling: Annotated[
        bool,
        typer.Option("--ceiling", help="Also force the wanted value at the subject's last token: what REP can reach."),
    ] = False,
    all_metrics: Annotated[bool, typer.Option("--all-metrics", help="Show metrics of every protocol.")] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Edit record after record, each on the clean model, and measure what holds and what is disturbed."""
    layer, overrides = one_layer(layers), settings(set_)
    chosen_seeds = [seed] if seed is not None else numbers(seeds, "--seeds")
    if resume and out is None:
        raise typer.BadParameter("needs --out with the run's directory", param_hint="--resume")
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.evaluation import Protocol, RunDirectory, evaluate_single

        if out is not None:
            check_directory(out)
            if not RunDirectory.check_place(out, resume=resume) and resume:
                screen.say(f"no run in {out} yet: this one begins there")
        watch = Stopwatch()
        lm = open_model(model, device=device, dtype=dtype)
        chosen = choose_cases(screen, lm, cases, split=split, limit=limit, skip_bad=skip_bad)
        bench = open_workbench(screen, lm, text=text, preset=preset, overrides=overrides, layer=layer, moments=moments)
        methods, objectives = names(method), _objectives(rep, rep_objective)
        columns, described = bench.columns(methods, objectives), bench.settings(methods, objectives)
        watch.lap("load")
        screen.interrupted = "interrupted before the first record; what was gathered so far is kept in the cache"
        bench.prepare(methods, rep=objectives, seeds=chosen_seeds)
        watch.lap("prepare")
        screen.interrupted = _interrupted(out)
        summary = evaluate_single(
            lm,
            chosen,
            columns,
            seeds=chosen_seeds,
            text=bench.context_text,
            out_dir=out,
            resume=resume,
            settings=described,
            protocol=Protocol.of_preset(bench.preset),
            # what no key-side method can be expected to beat (methods §17)
            ceiling_of=methods[0] if ceiling else None,
            progress=lambda done, total: screen.progress("evaluate", done, total),
        )
        watch.lap("evaluate")
        screen.show(summary.table(metrics=None) if all_metrics else summary.table())
        _say_failures(screen, summary)
        if out is not None:
            screen.show(f"every result is in {out}: results.jsonl, summary.json, summary.csv")
        screen.answer(as_json_object(model, len(chosen), chosen_seeds, summary, watch))


def _objectives(rep: bool, rep_objective: str | None) -> list[str | bool | None]:
    """None for the plain column, True for the default objective, then those asked for by name."""
    asked: list[str | bool | None] = [None]
    if rep:
        asked.append(True)
    return asked + list(names(rep_objective or ""))


def _interrupted(out: Path | None) -> str:
    if out is None:
        return "interrupted; nothing was kept: give --out DIR to be able to resume"
    return f"interrupted; all results so far are in {out}: run the same command with --resume to go on"


def _say_failures(screen: Screen, summary: Summary) -> None:
    for column, messages in summary.failures.items():
        for message in messages[:3]:
            screen.warn(f"{column}: {message}")
        if len(messages) > 3:
            screen.warn(f"{column}: {len(messages) - 3} more records could not be edited")


def as_json_object(model: str, n_cases: int, seeds: list[int], summary: Summary, watch: Stopwatch) -> dict[str, Any]:
    """What `evaluate --json` prints; the main metrics are there for every column, empty ones with n = 0."""
    from rep_fast.evaluation import MAIN_METRICS, PROTOCOL_OF

    def cell(column: str, name: str) -> dict[str, Any]:
        found = summary[column].get(name)
        if found is None or not math.isfinite(found.mean):
            return {"mean": None, "std": None, "n": 0}
        return {"mean": found.mean, "std": found.std, "n": found.n}

    rest = [name for name in summary.metrics if name not in MAIN_METRICS]
    return {
        "model": model,
        "cases": n_cases,
        "seeds": seeds,
        "backend": backend_names(),
        "timing": {
            **watch.as_json(),
            "per_case_s": {
                column: {stage: vars(spread) for stage, spread in stages.items()}
                for column, stages in summary.seconds.items()
            },
        },
        "metrics": {
            column: {name: cell(column, name) for name in (*MAIN_METRICS, *rest)} for column in summary.columns
        },
        "protocols": {name: PROTOCOL_OF[name] for name in (*MAIN_METRICS, *rest)},
        "failures": {column: list(messages) for column, messages in summary.failures.items()},
    }
