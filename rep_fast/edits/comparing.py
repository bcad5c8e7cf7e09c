"""How two edits differ: which facts, which settings, which modules, and how alike their weight changes are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rep_fast.edits.delta import Delta
from rep_fast.edits.edit import Edit
from rep_fast.edits.low_rank import LowRank
from rep_fast.facts import Fact


@dataclass(frozen=True)
class ModuleComparison:
    """Two edits at one linear module.

    place: (layer, linear). kinds: of delta in the first and the second edit, None where it has none there. norms:
    Frobenius norms. cosine: ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖ ‖ΔW₂‖), None where one is missing or zero. adapters: how many key
    adapters each has.
    """

    place: tuple[int, str]
    kinds: tuple[str | None, str | None]
    norms: tuple[float, float]
    cosine: float | None
    adapters: tuple[int, int]


@dataclass(frozen=True)
class EditComparison:
    """What two edits have in common and what not.

    same_model: their fingerprints agree. only_first, only_second: facts. hparams: name → (first, second) where they
    differ. modules: one entry per module that either touches.
    """

    same_model: bool
    only_first: tuple[Fact, ...]
    only_second: tuple[Fact, ...]
    hparams: dict[str, tuple[Any, Any]]
    modules: tuple[ModuleComparison, ...]


def compare(first: Edit, second: Edit) -> EditComparison:
    """Compare two edits, of one model or of two with equal shapes."""
    names = sorted(first.hparams.keys() | second.hparams.keys())
    settings = {name: (first.hparams.get(name), second.hparams.get(name)) for name in names}
    places = sorted({module.place for edit in (first, second) for module in edit.modules})
    return EditComparison(
        same_model=first.fingerprint == second.fingerprint,
        only_first=tuple(fact for fact in first.facts if fact not in second.facts),
        only_second=tuple(fact for fact in second.facts if fact not in first.facts),
        hparams={name: pair for name, pair in settings.items() if pair[0] != pair[1]},
        modules=tuple(_compare_at(first, second, place) for place in places),
    )


def inner_product(first: Delta, second: Delta) -> float:
    """⟨ΔW₁, ΔW₂⟩ in float64; of low-rank deltas by their factors, in O((D + M) r²)."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        lefts = first.left.double().T @ second.left.double()
        rights = first.right.double() @ second.right.double().T
        return float((lefts * rights).sum())
    return float(torch.sum(first.to_dense().double() * second.to_dense().double()))


def _compare_at(first: Edit, second: Edit, place: tuple[int, str]) -> ModuleComparison:
    found = [next((module for module in edit.modules if module.place == place), None) for edit in (first, second)]
    deltas = [None if module is None else module.delta for module in found]
    norms = [0.0 if delta is None else max(inner_product(delta, delta), 0.0) ** 0.5 for delta in deltas]
    cosine = None
    one, two = deltas
    if one is not None and two is not None and one.shape == two.shape and norms[0] * norms[1] > 0:
        cosine = inner_product(one, two) / (norms[0] * norms[1])
    return ModuleComparison(
        place=place,
        kinds=(None if one is None else one.kind, None if two is None else two.kind),
        norms=(norms[0], norms[1]),
        cosine=cosine,
        adapters=(len(found[0].adapters) if found[0] else 0, len(found[1].adapters) if found[1] else 0),
    )
