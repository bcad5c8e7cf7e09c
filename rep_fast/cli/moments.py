"""`rep-fast moments`: gather second moments of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from rep_fast.cli.opening import Stopwatch, backend_names, open_model
from rep_fast.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    TextOption,
    numbers,
)
from rep_fast.cli.screen import opened
from rep_fast.cli.writable import check_file
from rep_fast.errors import SingularMomentError


def moments(
    model: ModelOption,
    text: TextOption = None,
    layers: Annotated[str, typer.Option("--layers", metavar="L", help="Layer numbers like 1,2; the first is 0.")] = "",
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="N", help="A number, 10xM (times the key width) or full.")
    ] = "10xM",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also save them to this file; missing directories are made."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Gather second moments of a model's keys, kept in the cache for every later edit."""
    wanted = numbers(layers or None, "--layers")
    if not wanted:
        raise typer.BadParameter("name at least one layer, like 1,2", param_hint="--layers")
    with opened(as_json=as_json, debug=debug) as screen:
        if out is not None:
            check_file(out, "--out")
        from rep_fast.api import text_source
        from rep_fast.stats import SecondMoments

        watch = Stopwatch()
        lm = open_model(model, device=device, dtype=dtype)
        source = text_source(text, lm)
        watch.lap("load")
        screen.interrupted = "interrupted; what was gathered is kept in the cache: run the same command to go on"
        found = SecondMoments.collect(
            lm,
            source,
            wanted,
            tokens=int(tokens) if tokens.isdigit() else tokens,
            progress=lambda done, total: screen.progress("second moments", done, total),
        )
        watch.lap("collect")
        rows = [_row(found, layer) for layer in found.layers]
        _check_enough(rows)
        if out is not None:
            found.save(out)
        table = Table(
            "layer", "tokens", "key width M", "tr(C)/M", "tokens/M", title=f"Second moments over {found.corpus}"
        )
        for row in rows:
            enough = row["tokens"] / row["key_width"]
            table.add_row(
                str(row["layer"]),
                f"{row['tokens']:,}",
                str(row["key_width"]),
                f"{row['mean_square']:.4g}",
                f"{enough:.1f}",
            )
        screen.show(table)
        screen.show(f"saved to {out}" if out else "kept in the cache; edits of this model with this text will use them")
        screen.answer(
            {
                "model": model,
                "corpus": found.corpus,
                "fingerprint": found.fingerprint,
                "layers": rows,
                "saved": None if out is None else str(out),
                "backend": backend_names(),
                "timing": watch.as_json(),
            }
        )


def _check_enough(rows: list[dict[str, Any]]) -> None:
    """No edit can use a singular second moment, so none is saved or announced."""
    for row in rows:
        if row["tokens"] < row["key_width"]:
            raise SingularMomentError(
                f"layer {row['layer']}: {row['tokens']} tokens are fewer than M = {row['key_width']}, so the second "
                "moment is singular; give a longer --text or more --tokens"
            )


def _row(found: Any, layer: int) -> dict[str, Any]:
    moment = found.second_moment(layer)
    return {
        "layer": layer,
        "tokens": found.counts[layer],
        "key_width": moment.shape[0],
        "mean_square": float(moment.diagonal().mean()),
    }
