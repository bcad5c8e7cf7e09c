"""Edits as things: low-rank deltas, key adapters, applying, stacking, undoing, storing."""

from __future__ import annotations

from rep_fast.edits.applying import AppliedEdit
from rep_fast.edits.delta import LowRank
from rep_fast.edits.edit import Edit, ModuleEdit
from rep_fast.edits.key_adapter import KeyAdapter

__all__ = ["AppliedEdit", "Edit", "KeyAdapter", "LowRank", "ModuleEdit"]
