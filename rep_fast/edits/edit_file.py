"""Edits on disk: one safetensors file with a JSON description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rep_fast.edits.applying import check_fits
from rep_fast.edits.delta import LowRank
from rep_fast.edits.edit import Edit, ModuleEdit
from rep_fast.edits.key_adapter import PARTS, KeyAdapter
from rep_fast.errors import CorruptFileError, RepFastError
from rep_fast.facts import Fact
from rep_fast.ops.gated_adapter import AdapterWeights
from rep_fast.tensor_files import load_tensors, save_tensors

if TYPE_CHECKING:
    from rep_fast.models import EditableLM

KIND = "edit"
VERSION = 1
_LOW_RANK = "low_rank"


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
            tensors={name.removeprefix("tensor."): t for name, t in tensors.items() if name.startswith("tensor.")},
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
    """JSON description of a module edit; its tensors are put into `tensors` under names that hold the layer."""
    prefix = f"layer.{module.layer}"
    if module.delta is not None:
        tensors[f"{prefix}.left"], tensors[f"{prefix}.right"] = module.delta.left, module.delta.right
    adapters = []
    for number, adapter in enumerate(module.adapters):
        for part in PARTS:
            tensors[f"{prefix}.adapter.{number}.{part}"] = getattr(adapter.weights, part)
        adapters.append({"tau": adapter.tau, "trained_for": list(adapter.trained_for), "notes": dict(adapter.notes)})
    return {"layer": module.layer, "delta": None if module.delta is None else _LOW_RANK, "adapters": adapters}


def _module(path: str | Path, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModuleEdit:
    prefix, kind = f"layer.{entry['layer']}", entry["delta"]
    if kind not in (None, _LOW_RANK):
        raise CorruptFileError(
            f"{path} holds a delta of unknown kind {kind!r} at layer {entry['layer']}; update rep_fast"
        )
    delta = None if kind is None else LowRank(tensors[f"{prefix}.left"], tensors[f"{prefix}.right"])
    adapters = tuple(
        KeyAdapter(
            AdapterWeights(**{part: tensors[f"{prefix}.adapter.{number}.{part}"] for part in PARTS}),
            tau=adapter["tau"],
            trained_for=tuple(adapter["trained_for"]),
            notes=adapter["notes"],
        )
        for number, adapter in enumerate(entry["adapters"])
    )
    return ModuleEdit(int(entry["layer"]), delta, adapters)
