"""`rep-fast evaluate`: how well edits hold over many records, with and without REP."""

from __future__ import annotations

import dataclasses
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
    settings,
    some_layers,
)
from rep_fast.cli.screen import Screen, opened
from rep_fast.cli.writable import check_directory

if TYPE_CHECKING:
    from rep_fast.api import Workbench
    from rep_fast.evaluation import Cell, Protocol, Regime, Summary, WriteStep

# editors that optimise an MLP output and, at one layer, write exactly that
CEILING_METHODS = ("rome", "r-rome", "pmet")


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
    regime: Annotated[
        str,
        typer.Option(
            "--regime",
            metavar="R",
            help="single; batch:N (N records by one edit); sequential:N (N edits on top of one another) or sequential; "
            "cumulative:N (all records, N per edit); joint-epochs (all by one edit).",
        ),
    ] = "single",
    evaluate_every: Annotated[
        int | None,
        typer.Option("--evaluate-every", metavar="K", help="In sequential and cumulative: also after every K edits."),
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Let each seed shuffle the records before they are grouped.")
    ] = False,
    allow_conflicts: Annotated[
        bool, typer.Option("--allow-conflicts", help="Let one edit take records that contradict each other.")
    ] = False,
    ask_edited_neighbours: Annotated[
        bool,
        typer.Option(
            "--ask-edited-neighbours",
            help="Also ask neighbour prompts that another record of the same group edits, as the published code does; "
            "default: they are left out of locality and counted.",
        ),
    ] = False,
    transform: Annotated[
        str | None,
        typer.Option(
            "--transform",
            metavar="T",
            help="prune or prune:BASE of each group's accumulated update, rect or rect:PERCENT of each edit.",
        ),
    ] = None,
    keep_edits: Annotated[
        bool, typer.Option("--keep-edits", help="Leave the edits of a stacked regime in --out.")
    ] = False,
    ceiling: Annotated[
        bool,
        typer.Option("--ceiling", help="Also force the wanted value at the subject's last token: what REP can reach."),
    ] = False,
    all_metrics: Annotated[bool, typer.Option("--all-metrics", help="Show metrics of every protocol.")] = False,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="M", help="Show these, by comma, instead of the main ones.")
    ] = None,
    fluency: Annotated[
        bool, typer.Option("--fluency", help="Let edited models write texts and measure their fluency (slow).")
    ] = False,
    references: Annotated[
        Path | None,
        typer.Option(
            "--references", metavar="FILE", help="JSON, target to texts about it: consistency of what is written."
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Edit record after record, by default each on the clean model, and measure what holds and what is disturbed."""
    layer, overrides = some_layers(layers), settings(set_)
    chosen_seeds = [seed] if seed is not None else numbers(seeds, "--seeds")
    _check_out(out, resume=resume, keep_edits=keep_edits)
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.evaluation import Transform, check_contradictions, evaluate_regime, read_references

        stacking = _regime(regime, evaluate_every=evaluate_every, ceiling=ceiling)
        shown = _shown_metrics(metrics, all_metrics=all_metrics, generated=fluency or references is not None)
        texts = None if references is None else read_references(references)
        transforming = None if transform is None else Transform.parse(transform)
        _check_place(screen, out, resume=resume)
        watch = Stopwatch()
        lm = open_model(model, device=device, dtype=dtype)
        chosen = choose_cases(screen, lm, cases, split=split, limit=limit, skip_bad=skip_bad)
        if (note := stacking.note(len(chosen))) is not None:
            screen.say(note)
        bench = open_workbench(
            screen, lm, text=text, preset=preset, overrides=overrides, layer=layer, moments=moments,
            allow_conflicts=allow_conflicts,
        )  # fmt: skip
        methods, objectives = names(method), _objectives(rep, rep_objective)
        if not bench.allows_conflicts(methods):
            check_contradictions(chosen, stacking)
        if ceiling and methods:
            _check_ceiling_method(bench, methods[0])
        described = bench.settings(methods, objectives)
        protocol = _protocol(
            bench, shown, generated=fluency or texts is not None, shuffle=shuffle, ask_edited=ask_edited_neighbours
        )
        watch.lap("load")
        columns = _prepared(screen, bench, stacking, methods, objectives, chosen_seeds)
        watch.lap("prepare")
        screen.interrupted = _interrupted(out)
        summary = evaluate_regime(
            lm, chosen, columns, regime=stacking, seeds=chosen_seeds, text=bench.context_text, out_dir=out,
            resume=resume, keep_edits=keep_edits, settings=described, protocol=protocol, references=texts,
            transform=transforming,
            # what no key-side method can be expected to beat (methods §17)
            ceiling_of=methods[0] if ceiling and methods else None,
            progress=lambda done, total: screen.progress("evaluate", done, total),
        )  # fmt: skip
        watch.lap("evaluate")
        _show(screen, summary, shown, out)
        _check_edited(summary, n_asked=len(chosen) * len(chosen_seeds))
        screen.answer(as_json_object(model, len(chosen), chosen_seeds, summary, watch))


def _check_out(out: Path | None, *, resume: bool, keep_edits: bool) -> None:
    for option, given in (("--resume", resume), ("--keep-edits", keep_edits)):
        if given and out is None:
            raise typer.BadParameter("needs --out with the run's directory", param_hint=option)


def _check_place(screen: Screen, out: Path | None, *, resume: bool) -> None:
    """Refuse an --out that cannot take the run; say where a run to be resumed begins instead."""
    from rep_fast.evaluation import RunDirectory

    if out is None:
        return
    check_directory(out)
    if not RunDirectory.check_place(out, resume=resume) and resume:
        screen.say(f"no run in {out} yet: this one begins there")


def _regime(text: str, *, evaluate_every: int | None, ceiling: bool) -> Regime:
    from rep_fast.evaluation import Regime, check_ceiling

    regime = Regime.parse(text, evaluate_every=evaluate_every)
    if ceiling:
        check_ceiling(regime)
    return regime


def _check_ceiling_method(bench: Workbench, method: str) -> None:
    """Refuse a ceiling of edits that carry no single MLP output v*, before the first of them is made.

    Raises:
        HparamError: the method's edits carry none.
    """
    from rep_fast.errors import HparamError

    layers = bench.layers(method)
    if method not in CEILING_METHODS or len(layers) > 1:
        raise HparamError(
            f"an edit by {method!r} at layers {list(layers)} carries no single MLP output v* for --ceiling; "
            "name rome or r-rome first in --method, or leave --ceiling out"
        )


def _prepared(
    screen: Screen,
    bench: Workbench,
    regime: Regime,
    methods: list[str],
    objectives: list[str | bool | None],
    seeds: list[int],
) -> dict[str, WriteStep]:
    """The columns, after everything that they share was gathered."""
    screen.interrupted = "interrupted before the first record; what was gathered so far is kept in the cache"
    bench.prepare(methods, rep=objectives, seeds=seeds)
    return _columns(bench, regime, methods, objectives, seeds)


def _columns(
    bench: Workbench,
    regime: Regime,
    methods: list[str],
    objectives: list[str | bool | None],
    seeds: list[int],
) -> dict[str, WriteStep]:
    from rep_fast.evaluation import one_by_one

    if regime.is_stacked:
        return bench.steps(methods, objectives, seeds=seeds)
    # on the clean model, columns of one method share the plain edit of a record
    return {name: one_by_one(build) for name, build in bench.columns(methods, objectives).items()}


def _shown_metrics(named: str | None, *, all_metrics: bool, generated: bool) -> list[str] | None:
    """Rows of the table, None for all.

    Raises:
        HparamError: no metric has that name.
    """
    from rep_fast.errors import HparamError
    from rep_fast.evaluation import GENERATED, MAIN_METRICS, PROTOCOL_OF

    if named is None:
        return None if all_metrics else [*MAIN_METRICS, *(GENERATED if generated else ())]
    for name in names(named):
        if name not in PROTOCOL_OF:
            raise HparamError(f"metric {name!r} is unknown; choose from {', '.join(PROTOCOL_OF)}")
    return names(named)


def _protocol(
    bench: Workbench, shown: list[str] | None, *, generated: bool, shuffle: bool, ask_edited: bool
) -> Protocol:
    """The preset's choices; texts are generated where they, or metrics of them, are asked for by name."""
    from rep_fast.evaluation import GENERATED, Protocol
    from rep_fast.evaluation.fluency import N_TOKENS

    protocol = Protocol.of_preset(bench.preset)
    if shuffle:
        protocol = dataclasses.replace(protocol, record_order="seed")
    if ask_edited:
        protocol = dataclasses.replace(protocol, edited_neighbours="ask")
    if protocol.generated_tokens or not (generated or set(GENERATED) & set(shown or ())):
        return protocol
    return dataclasses.replace(protocol, generated_tokens=N_TOKENS)


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


def _show(screen: Screen, summary: Summary, shown: list[str] | None, out: Path | None) -> None:
    for table in (summary.table(metrics=shown), *summary.checkpoint_tables(metrics=shown)):
        screen.show(table)
    _say_failures(screen, summary)
    if out is not None:
        screen.show(f"every result is in {out}: results.jsonl, summary.json, summary.csv")


def _check_edited(summary: Summary, *, n_asked: int) -> None:
    """Refuse to call a run done in which no column edited any record.

    Raises:
        RecordError: the first reason is named.
    """
    from rep_fast.errors import RecordError

    if all(len(own) >= n_asked for own in summary.failures.values()):
        reason = next(message for own in summary.failures.values() for message in own)
        raise RecordError(f"no record could be edited, so nothing was measured; the first reason: {reason}")


def _say_failures(screen: Screen, summary: Summary) -> None:
    for column, messages in summary.failures.items():
        for message in messages[:3]:
            screen.warn(f"{column}: {message}")
        if len(messages) > 3:
            screen.warn(f"{column}: {len(messages) - 3} more records could not be edited")


def as_json_object(model: str, n_cases: int, seeds: list[int], summary: Summary, watch: Stopwatch) -> dict[str, Any]:
    """What `evaluate --json` prints; the main metrics are there for every column, empty ones with n = 0."""
    from rep_fast.evaluation import MAIN_METRICS, PROTOCOL_OF

    def cell(found: Cell | None) -> dict[str, Any]:
        if found is None or not math.isfinite(found.mean):
            return {"mean": None, "std": None, "n": 0}
        return {"mean": found.mean, "std": found.std, "n": found.n}

    rest = [name for name in summary.metrics if name not in MAIN_METRICS]
    shown = (*MAIN_METRICS, *rest)
    return {
        "model": model,
        "regime": summary.regime,
        "n_edits": summary.n_edits,
        "transform": summary.settings.get("transform"),
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
        "metrics": {column: {name: cell(cells.get(name)) for name in shown} for column, cells in summary.cells.items()},
        "checkpoints": {
            column: {
                str(n_edits): {name: cell(found) for name, found in cells.items()} for n_edits, cells in points.items()
            }
            for column, points in summary.checkpoints.items()
        },
        "protocols": {name: PROTOCOL_OF[name] for name in shown},
        "failures": {column: list(messages) for column, messages in summary.failures.items()},
        "neighbours_left_out": dict(summary.neighbours_left_out),
    }
