"""Second bodies of GPU kernels, for Hopper alone: each serves whoever asks for it by the environment, until it has been
measured beside the first."""

from __future__ import annotations

import os

import torch

from rep_fast.errors import BackendError

# op → the variable that asks, and the bodies it may name, the one that serves unasked first
GPU_BODIES = {
    "whitened_topk": ("REP_FAST_GPU_SCAN", ("product", "fused")),
    "accumulate_moment": ("REP_FAST_GPU_MOMENT", ("mma", "wgmma128", "wgmma192")),
}
_HOPPER = (9, 0)


def asked_gpu_body(op: str, device: torch.device) -> str:
    """Which body of `op` the environment asks for on `device`; the first where it asks for none.

    Raises:
        BackendError: it names no body, or one of the later ones for a GPU other than Hopper.
    """
    variable, bodies = GPU_BODIES[op]
    name = os.environ.get(variable) or bodies[0]
    if name not in bodies:
        raise BackendError(f"{variable}: must be one of {', '.join(bodies)}, got {name!r}")
    if name == bodies[0]:
        return name
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else _HOPPER
    if (major, minor) != _HOPPER:
        raise BackendError(f"{variable}: {name!r} needs a GPU of sm_90, this is sm_{major}{minor}; unset it")
    return name


def check_asked_bodies() -> None:
    """Looks at what the environment asks for where no GPU does.

    Raises:
        BackendError: a variable names no body.
    """
    for op in GPU_BODIES:
        asked_gpu_body(op, torch.device("cpu"))
