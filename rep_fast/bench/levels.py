"""Instruction sets a benchmark runs our bodies at."""

from __future__ import annotations

from rep_fast.ops import native


def timed_levels(op: str) -> list[str]:
    """Levels with a body of their own, those `REP_FAST_ISA` allows; the portable one only where there is no other."""
    module = native.find().module
    if module is None:
        return []
    bodies = module.body_levels[op]
    own = [name for row, name in enumerate(native.levels(module)) if bodies[row] == row]
    return own[1:] or own
