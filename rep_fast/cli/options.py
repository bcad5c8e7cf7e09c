"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="M", help="factworld, a hub id, or a directory of a saved model.")
]
PromptOption = Annotated[str, typer.Option("--prompt", help="The fact's prompt with {} where the subject goes.")]
SubjectOption = Annotated[str, typer.Option("--subject", help="What the fact is about.")]
TargetOption = Annotated[str, typer.Option("--target", help="The answer that is wanted.")]
CasesOption = Annotated[
    Path | None,
    typer.Option("--cases", metavar="FILE", help="JSON records: robustness, CounterFact, zsRE or PAC format."),
]
SplitOption = Annotated[
    str, typer.Option("--split", help="Without --cases: the model's own records, test or validation.")
]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed records out and list them.")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N records.")]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="TEXT",
        help="Text for moments, negatives and contexts: a .txt or .jsonl file, factworld, wikitext-103, wikipedia or "
        "dataset:NAME. Default: the model's own.",
    ),
]
LayersOption = Annotated[str | None, typer.Option("--layers", metavar="L", help="Layer numbers, the first is 0.")]
MomentsOption = Annotated[
    Path | None,
    typer.Option(
        "--moments", metavar="FILE", help="Second moments saved by rep-fast moments --out; default: the cache."
    ),
]
PresetOption = Annotated[str | None, typer.Option("--preset", help="Hyper-parameters by name.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change one hyper-parameter; may be given several times."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1 …, or auto to use all GPUs. Default: a GPU if there is one."),
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16 … Default: as stored.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def numbers(text: str | None, option: str) -> list[int]:
    """Whole numbers separated by commas; [] for None."""
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"-?\d+", part) for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers like 0,1,2", param_hint=option)
    return [int(part) for part in parts]


def names(text: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def one_layer(text: str | None) -> int | None:
    """The layer of an option that takes one."""
    layers = numbers(text, "--layers")
    if len(layers) > 1:
        raise typer.BadParameter(
            f"{text!r} names {len(layers)} layers, this command works on one", param_hint="--layers"
        )
    return layers[0] if layers else None


def some_layers(text: str | None) -> int | tuple[int, ...] | None:
    """The layer, or the layers in their order, of an option that takes several."""
    layers = tuple(numbers(text, "--layers"))
    return layers if len(layers) > 1 else layers[0] if layers else None


def settings(pairs: list[str] | None) -> dict[str, str]:
    """`NAME=VALUE` pairs; the values are checked by whoever takes them."""
    found: dict[str, str] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{pair!r} is not of the form NAME=VALUE", param_hint="--set")
        found[name.strip()] = value.strip()
    return found
