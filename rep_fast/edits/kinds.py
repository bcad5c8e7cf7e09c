"""The kinds of delta and replacement that edits are made of, by the name under which files know them."""

from __future__ import annotations

from rep_fast.edits.codebook import Codebook
from rep_fast.edits.delta import Delta
from rep_fast.edits.dense import Dense
from rep_fast.edits.low_rank import LowRank
from rep_fast.edits.replacement import Replacement
from rep_fast.edits.side_memory import SideMemory
from rep_fast.edits.slices import Slices

KINDS: dict[str, type[Delta]] = {kind.kind: kind for kind in (LowRank, Slices, Dense)}
REPLACEMENTS: dict[str, type[Replacement]] = {kind.kind: kind for kind in (Codebook, SideMemory)}
