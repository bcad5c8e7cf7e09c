"""Edits as things: deltas, replacements, key adapters; applying, stacking, undoing, storing."""

from __future__ import annotations

from rep_fast.edits.accumulate import accumulate
from rep_fast.edits.applying import (
    AppliedEdit,
    active_composition,
    replacements_at,
    undo_all,
    with_native_keys,
    without_replacements,
)
from rep_fast.edits.codebook import Codebook
from rep_fast.edits.delta import Delta
from rep_fast.edits.dense import Dense
from rep_fast.edits.edit import PAST_KEYS, Edit, ModuleEdit
from rep_fast.edits.key_adapter import KeyAdapter
from rep_fast.edits.low_rank import LowRank
from rep_fast.edits.prune import prune
from rep_fast.edits.rect import rect
from rep_fast.edits.replacement import Replacement
from rep_fast.edits.side_memory import MemoryRules, SideMemory
from rep_fast.edits.slices import Slices
from rep_fast.edits.stack import EditStack

__all__ = [
    "PAST_KEYS",
    "AppliedEdit",
    "Codebook",
    "Delta",
    "Dense",
    "Edit",
    "EditStack",
    "KeyAdapter",
    "LowRank",
    "MemoryRules",
    "ModuleEdit",
    "Replacement",
    "SideMemory",
    "Slices",
    "accumulate",
    "active_composition",
    "prune",
    "rect",
    "replacements_at",
    "undo_all",
    "with_native_keys",
    "without_replacements",
]
