"""Edits on disk: one safetensors file with a JSON description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rep_fast.edits.applying import check_fits
from rep_fast.edits.delta import Delta
from rep_fast.edits.edit import Edit, ModuleEdit
from rep_fast.edits.key_adapter import PARTS, KeyAdapter
from rep_fast.edits.kinds import KINDS, REPLACEMENTS
from rep_fast.edits.replacement import Replacement
from rep_fast.errors import CorruptFileError, RepFastError
from rep_fast.facts import Fact
from rep_fast.ops.gated_adapter import AdapterWeights
from rep_fast.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from rep_fast.models import EditableLM

KIND = "edit"
VERSION = 1


def save_edit(edit: Edit, path: str | Path) -> None:
    """Write an edit; see `Edit.save`."""
    tensors = {f"tensor.{name}": tensor for name, tensor in edit.tensors.items()}
    modules = [_describe_module(module, tensors) for module in edit.modules]
    description = {
        "facts": [asdict(fact) for fact in edit.facts],
        "method": edit.method,
        "hparams": dict(edit.hparams),
        "fingerprint": edit.fingerprint,
        "model_name": edit.model_name,
        "modules": modules,
        "notes": edit.notes,
    }
    save_tensors(path, tensors, kind=KIND, version=VERSION, description=description)


def load_edit(path: str | Path, lm: EditableLM | None = None) -> Edit:
    """Read an edit; see `Edit.load`."""
    description, tensors = load_tensors(path, kind=KIND, version=VERSION)
    try:
        edit = Edit(
            facts=tuple(Fact(**fact) for fact in description["facts"]),
            method=description["method"],
            hparams=description["hparams"],
            fingerprint=description["fingerprint"],
            modules=tuple(_module(path, module, tensors) for module in description["modules"]),
            notes=description["notes"],
            tensors=_below("tensor.", tensors),
            model_name=description["model_name"],
        )
    except CorruptFileError:
        raise
    except (KeyError, TypeError, RepFastError) as error:
        raise CorruptFileError(f"{path} does not describe a usable edit ({error}); make it again") from None
    if lm is not None:
        check_fits(lm, edit)
    return edit


def _describe_module(module: ModuleEdit, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """JSON description of a module edit; its tensors are put into `tensors` under names that hold its place."""
    prefix = f"layer.{module.layer}.{module.linear}"
    tensors |= {f"{prefix}.vector.{name}": vector for name, vector in module.vectors.items()}
    delta = _describe_change(module.delta, prefix, tensors)
    replacement = _describe_change(module.replacement, f"{prefix}.replacement", tensors)
    adapters = []
    for number, adapter in enumerate(module.adapters):
        for part in PARTS:
            tensors[f"{prefix}.adapter.{number}.{part}"] = getattr(adapter.weights, part)
        adapters.append({"tau": adapter.tau, "trained_for": list(adapter.trained_for), "notes": dict(adapter.notes)})
    return {
        "layer": module.layer,
        "linear": module.linear,
        "delta": delta,
        "adapters": adapters,
        "replacement": replacement,
    }


def _describe_change(
    change: Delta | Replacement | None, prefix: str, tensors: dict[str, Tensor]
) -> dict[str, Any] | None:
    if change is None:
        return None
    tensors |= {f"{prefix}.{name}": part for name, part in change.parts().items()}
    return {"kind": change.kind, **change.settings()}


def _module(path: str | Path, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModuleEdit:
    layer, linear = int(entry["layer"]), entry["linear"]
    own = _below(f"layer.{layer}.{linear}.", tensors)
    adapters = tuple(
        KeyAdapter(
            AdapterWeights(**_below(f"adapter.{number}.", own)),
            tau=adapter["tau"],
            trained_for=tuple(adapter["trained_for"]),
            notes=adapter["notes"],
        )
        for number, adapter in enumerate(entry["adapters"])
    )
    delta = _change(path, entry, "delta", own, KINDS)
    # files written before there were replacements say nothing of them
    replacement = _change(path, entry, "replacement", _below("replacement.", own), REPLACEMENTS)
    return ModuleEdit(layer, delta, adapters, linear, _below("vector.", own), replacement)


def _change(
    path: str | Path, entry: Mapping[str, Any], role: str, parts: Mapping[str, Tensor], kinds: Mapping[str, Any]
) -> Any:
    if entry.get(role) is None:
        return None
    settings = dict(entry[role])
    kind = settings.pop("kind")
    if kind not in kinds:
        raise CorruptFileError(
            f"{path} holds a {role} of unknown kind {kind!r} at layer {entry['layer']}; update rep_fast"
        )
    return kinds[kind].from_parts(parts, settings)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
