"""Second bodies of GPU kernels, for Hopper alone: each serves whoever asks for it by the environment, until it has been
measured beside the first."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from rep_fast.errors import BackendError

_HOPPER = (9, 0)


def asked_gpu_body(variable: str, bodies: Sequence[str], device: torch.device) -> str:
    """Which of `bodies` the environment's `variable` asks for on `device`; the first where it is not set.

    Raises:
        BackendError: it names no body, or one of the later ones for a GPU other than Hopper.
    """
    name = os.environ.get(variable, bodies[0])
    if name not in bodies:
        raise BackendError(f"{variable}: must be one of {', '.join(bodies)}, got {name!r}")
    if name == bodies[0]:
        return name
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else _HOPPER
    if (major, minor) != _HOPPER:
        raise BackendError(f"{variable}: {name!r} needs a GPU of sm_90, this is sm_{major}{minor}; unset it")
    return name
