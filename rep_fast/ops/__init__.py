"""Tensor operations: each one has a plain torch reference and, where it wins, a native body.

Nothing here knows models. `backend()` tells which body runs and why; `profile()` what the calls cost.
"""

from __future__ import annotations

from rep_fast.ops.backend import backend
from rep_fast.ops.profile import Call, profile

__all__ = ["Call", "backend", "profile"]
