"""`rep-fast factworld train`: make a small model that knows a given set of facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from rep_fast.cli.opening import Stopwatch
from rep_fast.cli.options import DebugOption, JsonOption, SeedOption, SetOption, SkipBadOption, settings
from rep_fast.cli.screen import opened
from rep_fast.cli.writable import check_directory
from rep_fast.errors import OutputError


def train(
    facts: Annotated[
        Path | None,
        typer.Option(
            "--facts", metavar="FILE", help="Records whose true facts the model shall know. Default: factworld."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory for the model.")] = Path(
        "factworld-model"
    ),
    family: Annotated[str, typer.Option("--family", help="llama or gpt2.")] = "llama",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that stands in --out.")] = False,
    skip_bad: SkipBadOption = False,
    set_: SetOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a small model that knows the facts of factworld, or of your own file; minutes on two cores."""
    overrides = settings(set_)
    with opened(as_json=as_json, debug=debug) as screen:
        _check_free(out, force)
        from rep_fast import factworld
        from rep_fast.facts import read_cases
        from rep_fast.presets import flat_mapping, from_flat_mapping

        watch = Stopwatch()
        hparams = from_flat_mapping(
            factworld.TrainingHparams, {"family": family, **overrides}, where="factworld training"
        )
        world: factworld.FactSource
        if facts is None:
            world = factworld.World.generate()
        else:
            read = read_cases(facts, skip_bad=skip_bad)
            if read.skipped:
                screen.warn(f"{facts}: skipped {len(read.skipped)} malformed records")
            world = factworld.RecordWorld.from_cases(read.cases)
            if unstated := len(read.cases) - len(world.cases):
                screen.warn(f"{facts}: {unstated} records have no true answer and were left out")
        screen.interrupted = "interrupted; nothing was written: training cannot be resumed, start it again"
        lm = factworld.train(
            world,
            hparams,
            seed=seed,
            progress=lambda at: screen.progress("training", at.step, at.steps),
        )
        watch.lap("train")
        known = list(world.facts())
        recall = factworld.recall(lm, known)
        watch.lap("recall")
        factworld.save_trained(lm, world, out)
        parameters = sum(weight.numel() for weight in lm.model.parameters())
        table = Table("", "", show_header=False, box=None)
        table.add_row("facts", f"{len(known)} of {world.name}")
        table.add_row("recall of the true answers", f"{100 * recall:.1f} %")
        table.add_row("model", f"{family}, {parameters / 1e6:.1f} M parameters, {hparams.layers} layers")
        table.add_row("written to", str(out))
        screen.show(table)
        screen.show(f"try: rep-fast evaluate --model {out} --method rome --rep --limit 20")
        screen.answer(
            {
                "model": str(out),
                "world": world.name,
                "facts": len(known),
                "recall": recall,
                "parameters": parameters,
                "seed": seed,
                "hparams": flat_mapping(hparams),
                "timing": watch.as_json(),
            }
        )


def _check_free(out: Path, force: bool) -> None:
    """Raise OutputError when the model would replace something, or cannot be written."""
    check_directory(out)
    if not force and out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} is not empty; choose another --out, or replace what is there with --force")
