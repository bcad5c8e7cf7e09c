"""Copies from the host that do not drain the work queued on a GPU; for those to the host see `ops.arriving`."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a host tensor is copied behind the work queued there, and the host goes on at once."""
    if tensor.device.type != "cpu":
        return tensor.to(device)
    # from memory that can be paged out, CUDA first waits for the stream
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
