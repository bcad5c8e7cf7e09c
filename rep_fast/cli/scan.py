"""`rep-fast scan`: where in a corpus an edit would also be heard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

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
    SkipBadOption,
    SplitOption,
    TextOption,
    one_layer,
)
from rep_fast.cli.screen import Screen, opened

if TYPE_CHECKING:
    from rep_fast.collisions import ScanResult
    from rep_fast.facts import EditCase
    from rep_fast.models import EditableLM

_SHOWN_SUBJECTS, _SHOWN_HITS, _SHOWN_CONTEXT = 12, 3, 50


def scan(
    model: ModelOption,
    cases: CasesOption = None,
    split: SplitOption = "test",
    limit: LimitOption = None,
    skip_bad: SkipBadOption = False,
    text: TextOption = None,
    moments: MomentsOption = None,
    layers: LayersOption = None,
    top: Annotated[int, typer.Option("--top", help="Collisions per subject.")] = 10,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Scan only the first so many tokens; default: all.")
    ] = None,
    preset: PresetOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Scan a corpus for places whose keys collide with the facts' keys: where an edit would come through unwanted."""
    layer = one_layer(layers)
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.collisions import scan as scan_corpus

        watch = Stopwatch()
        lm = open_model(model, device=device, dtype=dtype)
        chosen = choose_cases(screen, lm, cases, split=split, limit=limit, skip_bad=skip_bad)
        bench = open_workbench(screen, lm, text=text, preset=preset, layer=layer, moments=moments)
        layer = bench.layer("rome")
        watch.lap("load")
        collected = bench.moments([layer])
        watch.lap("moments")
        if tokens is None:
            screen.say(
                f"scanning all of {bench.text.name}, whose length is not known beforehand; --tokens N ends after N"
            )
        found = scan_corpus(
            lm,
            [case.fact for case in chosen],
            bench.text,
            collected,
            layer,
            top=top,
            tokens=tokens,
            progress=lambda done, total: screen.progress("scan", done, total),
        )
        watch.lap("scan")
        _show(screen, lm, found, bench.text.name)
        screen.answer(
            {
                "model": model,
                "layer": layer,
                "text": bench.text.name,
                "tokens": found.n_tokens,
                "subjects": _subjects(chosen, found),
                "backend": backend_names(),
                "timing": watch.as_json(),
            }
        )


def _subjects(cases: list[EditCase], found: ScanResult) -> list[dict[str, Any]]:
    return [
        {
            "subject": case.fact.subject,
            "prompt": case.fact.prompt,
            "self_similarity": float(found.self_similarity[number]),
            "baseline_rho": float(found.baseline[number] / found.self_similarity[number]),
            "collisions": [
                {
                    "rho": hit.rho,
                    "score": hit.score,
                    "position": hit.corpus_position,
                    "prefix": hit.prefix_text,
                    "token": hit.hit_token,
                    "following": hit.following_text,
                }
                for hit in found.collisions[number]
            ],
        }
        for number, case in enumerate(cases)
    ]


def _show(screen: Screen, lm: EditableLM, found: ScanResult, text_name: str) -> None:
    from rep_fast.report.gathering import around_hit

    table = Table(
        "subject", "ρ", "corpus text, the hit in « »",
        title=f"Strongest collisions in {found.n_tokens:,} tokens of {text_name}, layer {found.layer}",
        title_justify="left",
    )  # fmt: skip
    ranked = sorted((own for own in found.collisions if own), key=lambda own: -own[0].rho)
    for own in ranked[:_SHOWN_SUBJECTS]:
        for number, hit in enumerate(own[:_SHOWN_HITS]):
            before, token, after = (escape(part) for part in around_hit(lm, hit, width=_SHOWN_CONTEXT))
            subject = escape(hit.subject) if number == 0 else ""
            table.add_row(subject, f"{hit.rho:.2f}", f"…{before}[bold]«{token}»[/bold]{after}…")
    screen.show(table)
    rest = len(ranked) - _SHOWN_SUBJECTS
    if rest > 0:
        screen.show(f"and {rest} more subjects with weaker collisions; --json lists all")
    screen.show("ρ is the share of the edit that comes through at that place: 1 is the edited prompt itself.")
