"""How two edits differ: which facts, which settings, which modules, and how alike their changes are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rep_fast.edits.codebook import Codebook
from rep_fast.edits.delta import Delta
from rep_fast.edits.edit import Edit, ModuleEdit
from rep_fast.edits.low_rank import LowRank
from rep_fast.edits.replacement import Replacement
from rep_fast.edits.side_memory import SideMemory
from rep_fast.facts import Fact


@dataclass(frozen=True)
class ModuleComparison:
    """Two edits at one linear module: their deltas there, or their replacements.

    place: (layer, linear). kinds: of what is compared in the first and the second edit, None where there is none.
    norms: Frobenius norms of ΔW, of a codebook's values, of the sum of a side memory's changes. cosine: ⟨ΔW₁, ΔW₂⟩/
    (‖ΔW₁‖ ‖ΔW₂‖), likewise for two side memories; of two codebooks only values at the same key count; None where one is
    missing, zero or of another nature. adapters: how many key adapters each has; they stand with the deltas.
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
    differ. modules: one entry per module that either touches, and a second one where there are replacements beside
    deltas or adapters.
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
        modules=tuple(found for place in places for found in _compare_at(first, second, place)),
    )


def inner_product(first: Delta, second: Delta) -> float:
    """⟨ΔW₁, ΔW₂⟩ in float64; of low-rank deltas by their factors, in O((D + M) r²)."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        lefts = first.left.double().T @ second.left.double()
        rights = first.right.double() @ second.right.double().T
        return float((lefts * rights).sum())
    return float(torch.sum(first.to_dense().double() * second.to_dense().double()))


def replacement_product(first: Replacement, second: Replacement) -> float | None:
    """⟨·, ·⟩ of two replacements in float64; None for two kinds, or kinds without one."""
    if isinstance(first, SideMemory) and isinstance(second, SideMemory):
        return float(torch.sum(first.changes.double().sum(dim=0) * second.changes.double().sum(dim=0)))
    if isinstance(first, Codebook) and isinstance(second, Codebook):
        # as vectors with one block per key: entries at different keys have nothing in common
        same_key = torch.stack([(key == second.keys).all(dim=1) for key in first.keys])
        return float(torch.sum(same_key * (first.values.double() @ second.values.double().T)))
    return None


def _compare_at(first: Edit, second: Edit, place: tuple[int, str]) -> list[ModuleComparison]:
    one, two = (_module_at(edit, place) for edit in (first, second))
    adapters = (len(one.adapters), len(two.adapters))
    found = []
    is_replaced = one.replacement is not None or two.replacement is not None
    if one.delta is not None or two.delta is not None or any(adapters) or not is_replaced:
        found.append(_compared(place, (one.delta, two.delta), inner_product, adapters))
    if is_replaced:
        found.append(_compared(place, (one.replacement, two.replacement), replacement_product, (0, 0)))
    return found


def _module_at(edit: Edit, place: tuple[int, str]) -> ModuleEdit:
    """The edit's entry of a module, an empty one where it has none."""
    own = (module for module in edit.modules if module.place == place)
    return next(own, ModuleEdit(place[0], linear=place[1]))


def _compared(
    place: tuple[int, str], changes: tuple[Any, Any], product: Callable[[Any, Any], float | None],
    adapters: tuple[int, int],
) -> ModuleComparison:  # fmt: skip
    one, two = changes
    norms = [0.0 if change is None else max(product(change, change) or 0.0, 0.0) ** 0.5 for change in changes]
    inner = None
    if one is not None and two is not None and one.shape == two.shape and norms[0] * norms[1] > 0:
        inner = product(one, two)
    return ModuleComparison(
        place=place,
        kinds=(None if one is None else one.kind, None if two is None else two.kind),
        norms=(norms[0], norms[1]),
        cosine=None if inner is None else inner / (norms[0] * norms[1]),
        adapters=adapters,
    )
