"""`rep-fast edits`: look at saved edits, compare them, stack them and take them back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from rep_fast.cli.opening import open_model
from rep_fast.cli.options import DebugOption, DeviceOption, DtypeOption, JsonOption, ModelOption
from rep_fast.cli.screen import opened
from rep_fast.cli.writable import check_file
from rep_fast.errors import FingerprintError, HparamError, MissingFileError

if TYPE_CHECKING:
    from rep_fast.edits import Edit, EditStack, ModuleEdit
    from rep_fast.edits.comparing import EditComparison

app = typer.Typer(no_args_is_help=True, help="Saved edits: show, list, diff, stack, undo, transform, ask.")
EditArgument = Annotated[Path, typer.Argument(metavar="EDIT", help="A file written by rep-fast edit --save.")]
StackArgument = Annotated[Path, typer.Argument(metavar="STACK", help="A directory made by rep-fast edits stack.")]


@app.command("show")
def show(edit: EditArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """What one edit writes, where, and what its adapters were trained to."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.edits import Edit

        found = Edit.load(edit)
        described = _described(found)
        screen.show(f"[bold]{escape(str(edit))}[/bold]: {found.method}, of {escape(found.model_name or 'a model')}")
        for fact in found.facts:
            screen.show(f"  {escape(fact.text)} → {escape(fact.target_new)}")
        screen.show(_modules_table(described["modules"]))
        screen.show("settings: " + ", ".join(f"{name}={value}" for name, value in sorted(found.hparams.items())))
        screen.answer({"file": str(edit), **described})


@app.command("list")
def list_(place: StackArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """The edits of a stack in their order, or all edit files of any other directory."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.edits import Edit

        stack, files = _files_of(place)
        rows = [(file, Edit.load(file)) for file in files]
        table = Table("#", "file", "method", "fact", "layers", "adapters")
        for number, (file, edit) in enumerate(rows, start=1):
            adapters = sum(len(module.adapters) for module in edit.modules)
            layers = ", ".join(map(str, edit.layers))
            table.add_row(
                str(number), escape(file.name), edit.method, escape(_facts(edit)), layers, str(adapters or "–")
            )
        screen.show(table)
        kind = "no stack" if stack is None else f"applied from the first to the last, adapters by {stack.compose!r}"
        screen.show(f"{len(rows)} edits; {kind}")
        described = [{"number": n, "file": str(file), **_described(edit)} for n, (file, edit) in enumerate(rows, 1)]
        screen.answer({"place": str(place), "is_stack": stack is not None, "edits": described})


@app.command("diff")
def diff(first: EditArgument, second: EditArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """How two edits differ: facts, settings, and how alike their weight changes are."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.edits import Edit
        from rep_fast.edits.comparing import compare

        found = compare(Edit.load(first), Edit.load(second))
        if not found.same_model:
            screen.warn("these are edits of two different models")
        for label, facts in ((first, found.only_first), (second, found.only_second)):
            for fact in facts:
                screen.show(f"only in {escape(str(label))}: {escape(fact.text)} → {escape(fact.target_new)}")
        for name, (one, two) in found.hparams.items():
            screen.show(f"{name}: {one} | {two}")
        screen.show(_difference_table(found))
        screen.answer(_difference_json(found))


@app.command("stack")
def stack(
    place: StackArgument,
    edits: Annotated[list[Path], typer.Argument(metavar="EDIT…", help="Edit files, the first applies first.")],
    compose: Annotated[
        str | None, typer.Option("--compose", help="chain, argmax or sum; only when the stack is new.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put edits on top of a stack, which is made if there is none."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.edits import Edit

        loaded = [Edit.load(file) for file in edits]
        found = _pushed(place, loaded, compose)
        screen.show(f"{place} now holds {len(found)} edits; rep-fast edits list {place} shows them")
        screen.answer({"place": str(place), "edits": list(found.files), "compose": found.compose})


@app.command("undo")
def undo(
    place: StackArgument,
    number: Annotated[
        int | None, typer.Option("--number", "-n", help="Which one, as `list` counts; default: the last.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take an edit off a stack; its file is kept in the stack's directory `undone`."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.edits import EditStack

        shorter, moved = EditStack.open(place).undo(number)
        screen.show(f"{len(shorter)} edits are left; the one taken back is {moved}")
        screen.answer({"place": str(place), "edits": list(shorter.files), "undone": str(moved)})


@app.command("transform")
def transform(
    place: Annotated[Path, typer.Argument(metavar="EDIT|STACK", help="An edit file or a stack.")],
    how: Annotated[str, typer.Argument(metavar="T", help="prune, prune:BASE, rect or rect:PERCENT.")],
    model: ModelOption,
    save: Annotated[Path, typer.Option("--save", metavar="FILE", help="Where the one edit goes.")],
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Put edits together into one, its sum bounded by PRUNE or each of them by RECT."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.edits import Edit, EditStack
        from rep_fast.evaluation import Transform

        transforming = Transform.parse(how)
        check_file(save, "--save")
        lm = open_model(model, device=device, dtype=dtype)
        held = EditStack.open(place).edits(lm) if place.is_dir() else [Edit.load(place)]
        made = transforming(held, lm)
        made.save(save)
        screen.show(_modules_table([_described_module(module) for module in made.modules]))
        screen.show(f"{len(held)} edits, transformed by {transforming.name}, are in {save}")
        screen.answer({"place": str(place), "edits": len(held), "saved": str(save), **_described(made)})


@app.command("ask")
def ask(
    place: Annotated[Path, typer.Argument(metavar="EDIT|STACK", help="An edit file or a stack.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT…", help="What the model is asked.")],
    model: ModelOption,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What the model says to prompts without and with the edits."""
    with opened(as_json=as_json, debug=debug) as screen:
        from rep_fast.edits import Edit, EditStack
        from rep_fast.report.answering import answers

        edited = EditStack.open(place) if place.is_dir() else Edit.load(place)
        lm = open_model(model, device=device, dtype=dtype)
        held = edited.edits(lm) if isinstance(edited, EditStack) else [edited]
        targets = [fact.target_new for edit in held for fact in edit.facts]
        before = answers(lm, prompts, targets)
        with edited.applied(lm):
            after = answers(lm, prompts, targets)
        table = Table("prompt", "before", "after")
        for row in zip(prompts, before, after, strict=True):
            table.add_row(*map(escape, row))
        screen.show(table)
        asked = [
            {"prompt": prompt, "before": b, "after": a} for prompt, b, a in zip(prompts, before, after, strict=True)
        ]
        screen.answer({"model": model, "edits": len(held), "answers": asked})


def _files_of(place: Path) -> tuple[EditStack | None, list[Path]]:
    """The stack in a directory with its files, or None and every edit file there."""
    from rep_fast.edits import EditStack
    from rep_fast.edits.stack import MANIFEST

    if (place / MANIFEST).exists():
        stack = EditStack.open(place)
        return stack, [place / name for name in stack.files]
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise MissingFileError(f"there are no edits in {place}; name a directory with files of rep-fast edit --save")
    return None, files


def _pushed(place: Path, edits: list[Edit], compose: str | None) -> EditStack:
    from rep_fast.edits import EditStack
    from rep_fast.edits.stack import MANIFEST

    if len({edit.fingerprint for edit in edits}) > 1:
        raise FingerprintError("these edits belong to different models; make one stack per model")
    if (place / MANIFEST).exists():
        if compose is not None:
            raise typer.BadParameter(f"{place} is a stack already and keeps its own", param_hint="--compose")
        stack, rest = EditStack.open(place), edits
    else:
        if compose not in (None, "chain", "argmax", "sum"):
            raise HparamError(f"--compose {compose!r} is unknown; choose from chain, argmax, sum")
        stack, rest = EditStack.create(place, edits[0], compose=compose or "chain"), edits[1:]  # type: ignore[arg-type]
    for edit in rest:
        stack = stack.push(edit)
    return stack


def _facts(edit: Edit) -> str:
    if not edit.facts:
        return "–"
    first = f"{edit.facts[0].text} → {edit.facts[0].target_new}"
    return first if len(edit.facts) == 1 else f"{first} and {len(edit.facts) - 1} more"


def _described(edit: Edit) -> dict[str, Any]:
    modules = [_described_module(module) for module in edit.modules]
    facts = [{"prompt": fact.prompt, "subject": fact.subject, "target_new": fact.target_new} for fact in edit.facts]
    return {
        "method": edit.method,
        "model": edit.model_name,
        "fingerprint": edit.fingerprint,
        "facts": facts,
        "hparams": dict(edit.hparams),
        "modules": modules,
    }


def _described_module(module: ModuleEdit) -> dict[str, Any]:
    changes = [change for change in (module.delta, module.replacement) if change is not None]
    return {
        "layer": module.layer,
        "linear": module.linear,
        "delta": None if module.delta is None else module.delta.kind,
        "replacement": None if module.replacement is None else module.replacement.kind,
        "shape": list(changes[0].shape) if changes else None,
        "numbers": sum(part.numel() for change in changes for part in change.parts().values()),
        "adapters": [
            {"tau": adapter.tau, "rank": adapter.rank, "trained_for": list(adapter.trained_for)}
            for adapter in module.adapters
        ],
    }


def _modules_table(modules: list[dict[str, Any]]) -> Table:
    table = Table("layer", "module", "change", "of a weight", "stored numbers", "adapters")
    for module in modules:
        shape = "–" if module["shape"] is None else " × ".join(map(str, module["shape"]))
        adapters = ", ".join(f"rank {one['rank']}, τ {one['tau']}" for one in module["adapters"]) or "–"
        numbers = f"{module['numbers']:,}"
        change = ", ".join(kind for kind in (module["delta"], module["replacement"]) if kind) or "–"
        table.add_row(str(module["layer"]), module["linear"], change, shape, numbers, adapters)
    return table


def _difference_table(found: EditComparison) -> Table:
    table = Table("layer", "module", "first", "second", "cosine of the changes", "adapters")
    for module in found.modules:
        sides = [
            "–" if kind is None else f"{kind}, norm {norm:.3g}"
            for kind, norm in zip(module.kinds, module.norms, strict=True)
        ]
        cosine = "–" if module.cosine is None else f"{module.cosine:.4f}"
        table.add_row(
            str(module.place[0]), module.place[1], *sides, cosine, f"{module.adapters[0]} | {module.adapters[1]}"
        )
    return table


def _difference_json(found: EditComparison) -> dict[str, Any]:
    def facts(side: Any) -> list[dict[str, str]]:
        return [{"prompt": one.prompt, "subject": one.subject, "target_new": one.target_new} for one in side]

    return {
        "same_model": found.same_model,
        "only_first": facts(found.only_first),
        "only_second": facts(found.only_second),
        "hparams": {name: list(pair) for name, pair in found.hparams.items()},
        "modules": [
            {
                "layer": module.place[0],
                "linear": module.place[1],
                "kinds": list(module.kinds),
                "norms": list(module.norms),
                "cosine": module.cosine,
                "adapters": list(module.adapters),
            }
            for module in found.modules
        ],
    }
