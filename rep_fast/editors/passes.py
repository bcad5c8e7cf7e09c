"""Further passes of a batch: what the edited model still does not answer is written again, on top of what was written.

A batch disturbs every token by the sum of its updates, so some facts miss their value. Writing just these again spares
more than a smaller weight of the corpus for all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rep_fast.editors.state import EditorState
from rep_fast.edits import PAST_KEYS, Edit, LowRank, ModuleEdit
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

KeyName = Callable[[Fact], Hashable]


class WrittenKeys:
    """Past keys of the passes so far, one row per key and layer; a key that is written again takes its own place.

    name: tells which facts share a key.
    """

    def __init__(self, name: KeyName) -> None:
        self._name = name
        self._rows: dict[Hashable, dict[int, Tensor]] = {}

    def add(self, part: Edit, firsts: Sequence[Fact]) -> None:
        """Take over the keys of a pass; `firsts`: one fact per row of its past keys."""
        for number, fact in enumerate(firsts):
            self._rows[self._name(fact)] = {
                module.layer: module.vectors[PAST_KEYS][number]
                for module in part.modules
                if PAST_KEYS in module.vectors
            }

    def without(self, facts: Sequence[Fact]) -> dict[int, Tensor]:
        """Layer → [p, M] of all keys but those of these facts; layers without any are left out.

        A key that is written again must not be protected against its own residual.
        """
        again = {self._name(fact) for fact in facts}
        kept = [rows for name, rows in self._rows.items() if name not in again]
        layers = dict.fromkeys(layer for rows in kept for layer in rows)
        return {layer: torch.stack([rows[layer] for rows in kept]) for layer in layers}


def protecting(state: EditorState, added: dict[int, Tensor], lm: EditableLM) -> EditorState:
    """The state with further keys."""
    if not added:
        return state
    joined = {
        layer: torch.cat([state.past_keys[layer].to(rows), rows]) if layer in state.past_keys else rows
        for layer, rows in added.items()
    }
    return EditorState({**state.past_keys, **joined}, lm.fingerprint, lm.name)


def joined_passes(parts: Sequence[Edit], written: WrittenKeys) -> Edit:
    """One edit that does what the passes do one on top of the other."""
    first = parts[0]
    kept = written.without(())
    modules = []
    for module in first.modules:
        deltas = [part.module(module.layer).delta for part in parts]
        delta = LowRank.concat([one for one in deltas if isinstance(one, LowRank)])
        vectors = {PAST_KEYS: kept[module.layer]} if module.layer in kept else {}
        if "k_star" in module.vectors:
            vectors |= _of_one_key(module, delta)
        modules.append(ModuleEdit(module.layer, delta, vectors=vectors))
    later = [[fact.text for fact in part.facts] for part in parts[1:]]
    return replace(first, modules=tuple(modules), notes={**first.notes, "later_passes": later})


def _of_one_key(module: ModuleEdit, delta: LowRank) -> dict[str, Tensor]:
    """k_star and direction of the first pass, and the response of the whole update.

    ρ(k) = ⟨ΔW k, ΔW k*⟩/‖ΔW k*‖² (methods §17).
    """
    key = module.vectors["k_star"]
    written = delta @ key
    response = delta.right.T @ (delta.left.T @ written) / written.square().sum()
    return {"k_star": key, "direction": module.vectors["direction"], "response": response}
