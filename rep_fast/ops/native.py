"""The native modules: whether they are there, why not, and which instruction set they may use."""

from __future__ import annotations

import os
from types import ModuleType
from typing import NamedTuple

import torch

from rep_fast.errors import BackendError


class Native(NamedTuple):
    """A native module, or None with the reason it cannot be imported."""

    module: ModuleType | None
    reason: str


def find() -> Native:
    """The native module, looked for at every call; nothing fails when it is missing."""
    try:
        from rep_fast import _C
    except ImportError as error:
        return Native(None, f"rep_fast._C cannot be imported ({error}); build it with: pip install -e .")
    return Native(_C, "rep_fast._C is built")


def find_cuda() -> Native:
    """The module of CUDA kernels, looked for when a tensor on a GPU asks; importing it needs no driver."""
    try:
        from rep_fast import _C_cuda
    except ImportError as error:
        return Native(
            None,
            f"rep_fast._C_cuda cannot be imported ({error}); build it where nvcc is with: "
            f"REP_FAST_CUDA=ON pip install -e .",
        )
    return Native(_C_cuda, "rep_fast._C_cuda is built")


def stream_number(device: torch.device) -> int:
    """The handle of torch's current stream on a GPU, as kernels take it; 0 elsewhere."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def level(module: ModuleType) -> int:
    """Row of the dispatch tables to use: the machine's, lowered by `REP_FAST_ISA` where that is set.

    Raises:
        BackendError: `REP_FAST_ISA` names no instruction set.
    """
    try:
        return module.resolve_level(os.environ.get("REP_FAST_ISA", ""))
    except ValueError as error:
        raise BackendError(f"REP_FAST_ISA: {error}") from None


def levels(module: ModuleType) -> list[str]:
    """Names of the instruction sets from the lowest to the one in use.

    Raises:
        BackendError: `REP_FAST_ISA` names no instruction set.
    """
    return [module.level_name(row) for row in range(level(module) + 1)]


def n_threads() -> int:
    """Threads a CPU kernel may use: torch's setting."""
    return torch.get_num_threads()
