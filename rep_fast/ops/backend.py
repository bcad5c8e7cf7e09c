"""Which body of an op runs, and why."""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from rep_fast.ops import native

OPS = ("accumulate_moment", "gated_adapter", "kbest_paths", "packed_scores", "spd_solver", "whitened_topk")


class Backend(NamedTuple):
    """The chosen body: `name` is `native-<level>` or `reference`; `module` is None for the plain torch body."""

    name: str
    reason: str
    module: ModuleType | None = None
    level: int = 0


def choose(op: str, device: torch.device | None = None) -> Backend:
    """The body of `op` that serves tensors on `device` (the CPU unless told).

    Raises:
        BackendError: `REP_FAST_ISA` names no instruction set.
    """
    found = native.find()
    if found.module is None:
        return Backend("reference", found.reason)
    if device is not None and device.type != "cpu":
        return Backend("reference", f"there is no native body for {device.type} tensors")
    bodies = found.module.body_levels
    if op not in bodies:
        return Backend("reference", "this op is plain torch and has no native body")
    allowed = native.level(found.module)
    body = found.module.level_name(bodies[op][allowed])
    cap = os.environ.get("REP_FAST_ISA")
    reason = (
        f"best body for {found.module.level_name(allowed)}, which the processor{' and REP_FAST_ISA' * bool(cap)} allows"
    )
    return Backend(f"native-{body}", reason, found.module, allowed)


def choose_or_warn(op: str, device: torch.device | None = None) -> Backend:
    """As `choose`, with a warning (shown once by Python's filter) when the plain torch body has to serve."""
    chosen = choose(op, device)
    if chosen.module is None:
        warnings.warn(f"{op}: the plain torch body serves, since {chosen.reason}", RuntimeWarning, stacklevel=2)
    return chosen


def backend() -> dict[str, tuple[str, str]]:
    """For each op the body that serves CPU tensors now, and why: op → (name, reason)."""
    return {op: choose(op)[:2] for op in OPS}
