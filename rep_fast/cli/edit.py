"""`rep-fast edit`: write one fact and see what the model says before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from rep_fast.cli.opening import (
    Stopwatch,
    backend_names,
    known_case,
    known_neighbours,
    open_model,
    open_workbench,
)
from rep_fast.cli.options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    ModelOption,
    MomentsOption,
    PresetOption,
    PromptOption,
    SeedOption,
    SetOption,
    SubjectOption,
    TargetOption,
    TextOption,
    settings,
    some_layers,
)
from rep_fast.cli.screen import Screen, opened
from rep_fast.cli.writable import check_file
from rep_fast.errors import HparamError, RecordError

if TYPE_CHECKING:
    from rep_fast.edits import Edit
    from rep_fast.facts import EditCase, Fact
    from rep_fast.models import EditableLM
    from rep_fast.report.data import EditedFact

_NEIGHBOURS = 4
_PER_KIND = 5


def edit(
    model: ModelOption,
    prompt: PromptOption,
    subject: SubjectOption,
    target: TargetOption,
    method: Annotated[str, typer.Option("--method", help="Editor: rome, memit, alphaedit …")] = "rome",
    rep: Annotated[bool, typer.Option("--rep", help="Also train REP's key adapter, so that rephrasings work.")] = False,
    rep_objective: Annotated[
        str | None, typer.Option("--rep-objective", help="calibrated or paper; implies --rep.")
    ] = None,
    rephrases: Annotated[
        Path | None,
        typer.Option("--rephrases", metavar="FILE", help="Other names of the subject, one per line or a JSON list."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Keep the edit (safetensors); missing directories are made."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export-peft", metavar="DIR", help="Also write a LoRA adapter that peft loads; not with --rep."),
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            "--answer-tokens",
            min=1,
            metavar="N",
            help="Show so many tokens of each answer; default: the target's and two.",
        ),
    ] = None,
    text: TextOption = None,
    moments: MomentsOption = None,
    layers: LayersOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Edit one fact and show what the model says before and after, for the prompt, other wordings and neighbours."""
    layer, overrides = some_layers(layers), settings(set_)
    with opened(as_json=as_json, debug=debug) as screen:
        if save is not None:
            check_file(save, "--save")
        if export is not None:
            check_file(export / "adapter_config.json", "--export-peft")
            if rep or rep_objective is not None:
                raise HparamError("a LoRA adapter cannot hold REP's key adapters; leave --rep or --export-peft out")
        from rep_fast.facts import Fact

        watch = Stopwatch()
        fact = Fact(prompt, subject, target)
        names = None if rephrases is None else read_rephrases(rephrases, fact.subject)
        lm = open_model(model, device=device, dtype=dtype)
        bench = open_workbench(screen, lm, text=text, preset=preset, overrides=overrides, layer=layer, moments=moments)
        objective = rep_objective or (True if rep else None)
        watch.lap("load")
        bench.prepare([method], rep=[objective], seeds=[seed])
        watch.lap("prepare")
        edits = {method: bench.edit(fact, method=method, seed=seed)}
        watch.lap("edit")
        if objective is not None:
            asked = None if objective is True else str(objective)
            edits[f"{method}+rep"] = bench.with_rep(edits[method], fact, objective=asked, rephrases=names, seed=seed)
            watch.lap("rep")
        made = edits[f"{method}+rep" if objective is not None else method]
        if save is not None:
            is_new = not save.parent.exists()
            made.save(save)
            if is_new:
                screen.say(f"made the directory {save.parent}")
        if export is not None:
            made.export_peft(export, lm)
        answered = _ask(lm, fact, names, edits, seed, answer_tokens)
        watch.lap("answers")
        rep_report = None if objective is None else _rep_report(made, names)
        _show(screen, answered, rep_report)
        if answer_tokens is None:
            screen.show("Answers are cut after the target's length and two tokens; --answer-tokens N shows more.")
        if save is not None:
            screen.show(f"saved to {save}; rep_fast.Edit.load({str(save)!r}).apply(lm) brings it back")
        if export is not None:
            screen.show(f"exported to {export}; peft.PeftModel.from_pretrained(model, {str(export)!r}) loads it")
        found = _as_json(model, method, made, answered, rep_report, save, watch, screen)
        screen.answer({**found, "exported": None if export is None else str(export)})


def read_rephrases(path: Path, subject: str) -> list[str]:
    """Other names of a subject: one per line, a JSON list, or a JSON object subject → list.

    Raises:
        RecordError: the file cannot be read, or holds no name for the subject.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read the rephrases in {path} ({error}); give a UTF-8 text or JSON file") from None
    found: Any = content.splitlines()
    if content.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(content)
        except json.JSONDecodeError as error:
            raise RecordError(f"{path} is not JSON: {error.msg} at line {error.lineno}") from None
    if isinstance(found, Mapping):
        found = found.get(subject, [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise RecordError(f"{path} must hold names as texts: one per line, a JSON list, or subject → list")
    names = list(dict.fromkeys(name.strip() for name in found if name.strip()))
    if not names:
        raise RecordError(f"{path} holds no other name for {subject!r}; write one per line")
    return names


def _ask(
    lm: EditableLM, fact: Fact, names: list[str] | None, edits: Mapping[str, Edit], seed: int, n_tokens: int | None
) -> EditedFact:
    """Answers to the prompt, the names that were given or are known, and a few neighbours."""
    from rep_fast.facts import EditCase, Sided
    from rep_fast.rep import surface_forms
    from rep_fast.report.gathering import edited_fact

    case: EditCase | None = known_case(lm, fact)
    known = case.subject_rephrases if case is not None else Sided()
    trained = tuple(names) if names is not None else surface_forms(fact.subject)
    # names the adapter was not trained on are the honest test of it
    unseen = tuple(name for name in known if name not in trained)
    asked = EditCase(
        case_id=0,
        fact=fact,
        paraphrase_prompts=case.paraphrase_prompts if case is not None else (),
        neighborhood_prompts=tuple(known_neighbours(lm, fact, _NEIGHBOURS)),
        subject_rephrases=Sided(trained, unseen),
    )
    return edited_fact(lm, asked, edits, per_kind=_PER_KIND, seed=seed, n_tokens=n_tokens)


def _rep_report(made: Edit, names: list[str] | None) -> dict[str, Any]:
    """What the adapter's training reports, and where its positives came from."""
    notes = dict(made.modules[0].adapters[0].notes)
    hparams = notes.pop("hparams", {})
    return {
        "objective": hparams.get("objective"),
        "positives": "the names given, shuffles and context prefixes"
        if names is not None
        else "simple surface forms, shuffles and context prefixes (no --rephrases given)",
        "rephrases": list(names or ()),
        **notes,
    }


def _show(screen: Screen, answered: EditedFact, rep_report: dict[str, Any] | None) -> None:
    before_slot, after_slot = answered.prompt.split("{}")
    first = answered.answers[0]
    screen.show(
        f"{escape(before_slot)}[bold]{escape(answered.subject)}[/bold]{escape(after_slot)}: "
        f"[strike]{escape(first.before)}[/strike] → [bold green]{escape(answered.target_new)}[/bold green]"
    )
    if rep_report is not None:
        screen.show(f"REP was trained on {rep_report['positives']}.")
        screen.show(
            f"Mean response ρ of those names: {rep_report['rho_before']:.2f} → {rep_report['rho_after']:.2f} "
            f"(1 is the edited prompt itself); the gate opens on {100 * rep_report['open_on_positives']:.0f} % of them"
            + (
                f" and on {100 * rep_report['open_on_negatives']:.1f} % of the negatives."
                if "open_on_negatives" in rep_report
                else "."
            )
        )
    columns = list(first.after)
    table = Table("form", "prompt", "before", *columns)
    for answer in answered.answers:
        cells = [_marked(answer.after[column], is_right=answer.is_right(column)) for column in columns]
        table.add_row(answer.kind, escape(answer.prompt), escape(answer.before), *cells)
    screen.show(table)


def _marked(text: str, *, is_right: bool) -> str:
    return f"[green]✓[/green] {escape(text)}" if is_right else f"[red]✗[/red] {escape(text)}"


def _as_json(
    model: str,
    method: str,
    made: Edit,
    answered: EditedFact,
    rep_report: dict[str, Any] | None,
    save: Path | None,
    watch: Stopwatch,
    screen: Screen,
) -> dict[str, Any]:
    first, last = answered.answers[0], list(answered.answers[0].after)[-1]
    return {
        "model": model,
        "fact": {
            "prompt": answered.prompt,
            "subject": answered.subject,
            "target_new": answered.target_new,
        },
        "method": method,
        "layers": list(made.layers),
        "before": first.before,
        "after": first.after[last],
        "holds": first.is_right(last),
        "answers": [
            {
                "kind": answer.kind,
                "prompt": answer.prompt,
                "before": answer.before,
                "after": dict(answer.after),
                "wanted": answer.wanted,
            }
            for answer in answered.answers
        ],
        "rep": rep_report,
        "saved": None if save is None else str(save),
        "warnings": screen.warnings,
        "backend": backend_names(),
        "timing": watch.as_json(),
    }
