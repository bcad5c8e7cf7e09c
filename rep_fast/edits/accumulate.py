"""Several edits as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rep_fast.edits.delta import Delta
from rep_fast.edits.dense import Dense
from rep_fast.edits.edit import PAST_KEYS, Edit, ModuleEdit
from rep_fast.edits.low_rank import LowRank
from rep_fast.edits.replacement import Replacement
from rep_fast.edits.slices import Slices
from rep_fast.errors import FingerprintError, HparamError, LayerError


def accumulate(edits: Sequence[Edit]) -> Edit:
    """One edit that does what these do when they are applied one after another.

    Deltas of one kind keep it, mixtures become dense; adapters follow in the order of the edits; replacements act as
    one. Past keys are kept; other vectors, tensors and notes, which describe single updates, are left out;
    hyper-parameters go to `notes`.

    Raises:
        HparamError: no edits, or replacements that do not follow one rule. FingerprintError: edits of different models.
        LayerError: deltas that do not fit, or replacements of two kinds at one module.
    """
    if not edits:
        raise HparamError("there are no edits to accumulate; give at least one")
    first = edits[0]
    for edit in edits:
        if edit.fingerprint != first.fingerprint:
            raise FingerprintError(
                f"edits of {first.model_name or 'one model'} ({first.fingerprint[:12]}…) and of "
                f"{edit.model_name or 'another'} ({edit.fingerprint[:12]}…) cannot be accumulated; keep them apart"
            )
    places = dict.fromkeys(module.place for edit in edits for module in edit.modules)
    modules = []
    for layer, linear in places:
        parts = [module for edit in edits for module in edit.modules if module.place == (layer, linear)]
        deltas = [module.delta for module in parts if module.delta is not None]
        adapters = tuple(adapter for module in parts for adapter in module.adapters)
        replacements = [module.replacement for module in parts if module.replacement is not None]
        kept = [module.vectors[PAST_KEYS] for module in parts if PAST_KEYS in module.vectors]
        modules.append(
            ModuleEdit(
                layer,
                _sum(deltas),
                adapters,
                linear,
                vectors={PAST_KEYS: torch.cat(kept)} if kept else {},
                replacement=_as_one(replacements, layer),
            )
        )
    return Edit(
        facts=tuple(fact for edit in edits for fact in edit.facts),
        method="+".join(dict.fromkeys(edit.method for edit in edits)),
        hparams={},
        fingerprint=first.fingerprint,
        modules=tuple(modules),
        notes={"accumulated": [{"method": edit.method, "hparams": dict(edit.hparams)} for edit in edits]},
        model_name=first.model_name,
    )


def _as_one(replacements: Sequence[Replacement], layer: int) -> Replacement | None:
    kinds = {type(replacement) for replacement in replacements}
    if len(kinds) > 1:
        raise LayerError(
            f"a codebook and a side memory at layer {layer} cannot become one edit; stack the edits instead"
        )
    return kinds.pop().stacked(replacements) if kinds else None


def _sum(deltas: Sequence[Delta]) -> Delta | None:
    if len(deltas) < 2:
        return deltas[0] if deltas else None
    sample = [part for delta in deltas for part in delta.parts().values() if part.is_floating_point()]
    dtype = max((part.dtype for part in sample), key=lambda found: torch.finfo(found).bits)
    alike = [delta.to(device=sample[0].device, dtype=dtype) for delta in deltas]
    low_rank = [delta for delta in alike if isinstance(delta, LowRank)]
    slices = [delta for delta in alike if isinstance(delta, Slices)]
    if len(low_rank) == len(alike):
        return LowRank.concat(low_rank)
    if len(slices) == len(alike) and len({delta.axis for delta in slices}) == 1:
        return Slices.concat(slices)
    return Dense.concat([Dense(delta.to_dense()) for delta in alike])
