"""`rep-fast demo`: the whole job on the embedded model, ending in a page to look at."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rep_fast.cli.evaluate import as_json_object
from rep_fast.cli.opening import Stopwatch, choose_cases, open_model, open_workbench
from rep_fast.cli.options import DebugOption, DeviceOption, JsonOption, SeedOption
from rep_fast.cli.screen import Screen, opened
from rep_fast.cli.writable import check_directory

if TYPE_CHECKING:
    from rep_fast.api import Workbench
    from rep_fast.collisions import ScanResult
    from rep_fast.evaluation import Summary
    from rep_fast.facts import EditCase
    from rep_fast.report import EditedFact, LayerScores, Similarities

MODEL, METHOD = "factworld", "rome"
SHOWN_EDITS, SCANNED, SCANNED_TOKENS, TRACED, MEASURED = 4, 12, 40_000, 8, 10


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the page goes.")] = Path("rep-fast-report"),
    limit: Annotated[int, typer.Option("--limit", min=1, help="Records to evaluate.")] = 24,
    model: Annotated[
        str, typer.Option("--model", metavar="M", help="factworld or a model of factworld train.")
    ] = MODEL,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show everything on a small embedded model: edit, make robust, evaluate, scan, trace, and a page with pictures."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.report import write_report

        check_directory(out)
        watch = Stopwatch()
        screen.interrupted = "interrupted; the page was not written, what was gathered for it is kept in the cache"
        lm = open_model(model, device=device)
        bench = open_workbench(screen, lm)
        cases = choose_cases(screen, lm, None, split="test", limit=limit)
        watch.lap("load the model")
        bench.prepare([METHOD], rep=True, seeds=[seed])
        watch.lap("second moments and negatives")
        edited, similar = _edit(screen, bench, cases, seed)
        watch.lap(f"edit {len(edited)} facts and measure similarities")
        summary = _evaluate(screen, bench, cases, seed)
        watch.lap(f"evaluate {len(cases)} records twice")
        scanned = _scan(screen, bench, cases)
        watch.lap(f"scan {scanned.n_tokens:,} tokens for collisions")
        layers = _trace(screen, bench, cases)
        watch.lap(f"trace {len(layers)} facts")
        data = _page(bench, summary, edited, similar, scanned, layers, len(cases), seed, watch, screen.warnings)
        page = write_report(data, out)
        watch.lap("write the page")
        screen.show(summary.table())
        screen.show(
            f"{len(cases)} records: a share may be off by {data.half_width:.0f} points "
            f"(95 % binomial half-width at 50 %); rep-fast evaluate --model {model} --rep asks all"
        )
        screen.show(f"done in {watch.total():.0f} s; open {page} in a browser")
        screen.answer(
            {
                **as_json_object(model, len(cases), [seed], summary, watch),
                "report": str(page),
                "edits": len(edited),
                "collisions": len(data.collisions),
            }
        )


def _edit(
    screen: Screen, bench: Workbench, cases: list[EditCase], seed: int
) -> tuple[list[EditedFact], tuple[Similarities, ...]]:
    """Some facts with their answers, and the similarities of a few more."""
    from rep_fast.analysis import form_similarities
    from rep_fast.errors import NothingToEditError
    from rep_fast.report.gathering import edited_fact, similarity_rows

    edited: list[EditedFact] = []
    measured = []
    # two records about one person stand beside each other: every second one shows other people
    chosen = cases[::2][: max(SHOWN_EDITS, MEASURED)]
    for number, case in enumerate(chosen):
        screen.progress("edit", number, len(chosen))
        try:
            plain = bench.edit(case, method=METHOD, seed=seed)
        except NothingToEditError as error:  # a model that was trained too short need not end the demo
            screen.warn(str(error))
            continue
        robust = bench.with_rep(plain, case, seed=seed)
        measured.append(form_similarities(bench, robust, case, seed=seed))
        if len(edited) < SHOWN_EDITS:
            edited.append(edited_fact(bench.lm, case, {METHOD: plain, f"{METHOD}+rep": robust}, seed=seed))
    screen.progress("edit", len(chosen), len(chosen))
    return edited, similarity_rows(measured)


def _evaluate(screen: Screen, bench: Workbench, cases: list[EditCase], seed: int) -> Summary:
    from rep_fast.evaluation import Protocol, evaluate_single

    return evaluate_single(
        bench.lm,
        cases,
        bench.columns([METHOD], [None, True]),
        seeds=[seed],
        text=bench.context_text,
        settings=bench.settings([METHOD], [None, True]),
        protocol=Protocol.of_preset(bench.preset),
        progress=lambda done, total: screen.progress("evaluate", done, total),
    )


def _scan(screen: Screen, bench: Workbench, cases: list[EditCase]) -> ScanResult:
    from rep_fast.collisions import scan

    layer = bench.layer(METHOD)
    return scan(
        bench.lm,
        [case.fact for case in cases[::2][:SCANNED]],
        bench.text,
        bench.moments([layer]),
        layer,
        tokens=SCANNED_TOKENS,
        progress=lambda done, total: screen.progress("scan", done, total),
    )


def _trace(screen: Screen, bench: Workbench, cases: list[EditCase]) -> list[LayerScores]:
    """Path scores of true facts: what the model knows, not what is to be written."""
    from rep_fast.paths import score_nodes
    from rep_fast.report.gathering import layer_scores

    rows = []
    chosen = [case.fact for case in cases[::2] if case.fact.target_true][:TRACED]
    for number, fact in enumerate(chosen):
        screen.progress("trace", number + 1, len(chosen))
        rows.append(layer_scores(f"{fact.subject}: {fact.target_true}", score_nodes(bench.lm, fact, target="true")))
    return rows


def _page(
    bench: Workbench,
    summary: Summary,
    edited: list[EditedFact],
    similar: tuple[Similarities, ...],
    scanned: ScanResult,
    layers: list[LayerScores],
    n_cases: int,
    seed: int,
    watch: Stopwatch,
    warnings: list[str],
) -> Any:
    from rep_fast import ops
    from rep_fast.report import ReportData
    from rep_fast.report.gathering import collision_rows, metric_rows, model_description

    layer = bench.layer(METHOD)
    timing = {
        "one ROME edit, median": summary.seconds[METHOD]["edit"].median,
        "REP training on top of it, median": summary.seconds[f"{METHOD}+rep"]["edit"].median,
        **watch.seconds,
    }
    return ReportData(
        title="Edits that hold: rep_fast demo",
        summary=f"Facts that the model {bench.lm.name} knows were rewritten with ROME, with and without REP's key "
        "adapter; then every edit was asked about in other words, and its neighbours were watched.",
        model=model_description(bench.lm, [layer]),
        edits=tuple(edited),
        columns=tuple(summary.columns),
        metrics=metric_rows(summary),
        cases=n_cases,
        seeds=(seed,),
        similarities=similar,
        collisions=collision_rows(bench.lm, scanned),
        scanned_tokens=scanned.n_tokens,
        layer_scores=tuple(layers),
        score_name="zabs",
        edited_layer=layer,
        timing=timing,
        backend=tuple((op, name, reason) for op, (name, reason) in ops.backend().items()),
        settings=summary.settings["hparams"],
        commands=(shlex.join(["rep-fast", "demo", "--seed", str(seed), "--limit", str(n_cases)]),),
        warnings=tuple(warnings),
    )
