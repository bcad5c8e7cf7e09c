"""Which body of an op runs, and why."""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from rep_fast.ops import native
from rep_fast.ops.gpu_bodies import GPU_BODIES, asked_gpu_body, check_asked_bodies

OPS = ("accumulate_moment", "gated_adapter", "kbest_paths", "packed_scores", "spd_solver", "whitened_topk")
OLDEST_GPU = (8, 0)  # compute capability


class Backend(NamedTuple):
    """The chosen body: `name` is `native-<level>`, `cuda-sm<capability>` or `reference`; `module` is None for the plain
    torch body."""

    name: str
    reason: str
    module: ModuleType | None = None
    level: int = 0

    @property
    def is_cuda(self) -> bool:
        """Whether `module` holds CUDA kernels."""
        return self.name.startswith("cuda")


def choose(op: str, device: torch.device | None = None) -> Backend:
    """The body of `op` that serves tensors on `device` (the CPU unless told).

    Raises:
        BackendError: `REP_FAST_ISA` names no instruction set.
    """
    if device is not None and device.type == "cuda":
        return _choose_cuda(op, device)
    if device is not None and device.type != "cpu":
        return Backend("reference", f"there is no native body for {device.type} tensors")
    found = native.find()
    if found.module is None:
        return Backend("reference", found.reason)
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


def _choose_cuda(op: str, device: torch.device) -> Backend:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_GPU:
        return Backend("reference", f"this GPU is sm_{major}{minor}, and the CUDA kernels need sm_80 or newer")
    found = native.find_cuda()
    if found.module is None:
        return Backend("reference", found.reason)
    if op not in found.module.bodies:
        return Backend("reference", "this op has no CUDA body")
    asked = f" by their body {asked_gpu_body(op, device)!r}" if op in GPU_BODIES else ""
    return Backend(f"cuda-sm{major}{minor}", f"CUDA kernels serve tensors on this GPU{asked}", found.module)


def choose_or_warn(op: str, device: torch.device | None = None) -> Backend:
    """As `choose`, with a warning (shown once by Python's filter) when the plain torch body has to serve."""
    chosen = choose(op, device)
    if chosen.module is None:
        warnings.warn(f"{op}: the plain torch body serves, since {chosen.reason}", RuntimeWarning, stacklevel=2)
    return chosen


def backend(device: torch.device | str = "cpu") -> dict[str, tuple[str, str]]:
    """For each op the body that serves tensors on `device` now, and why: op → (name, reason).

    Raises:
        BackendError: `REP_FAST_ISA` or a variable of `GPU_BODIES` asks for what there is not.
    """
    check_asked_bodies()
    return {op: choose(op, torch.device(device))[:2] for op in OPS}
