"""Copies between host and device that do not drain the work queued on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

# devices whose copies to the host can be waited for one by one
ASYNC_DEVICES = ("cuda",)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a host tensor is copied behind the work queued there, and the host goes on at once."""
    if tensor.device.type != "cpu":
        return tensor.to(device)
    # from memory that can be paged out, CUDA first waits for the stream
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Arriving:
    """A tensor on its way to the host.

    `read` waits for what was queued before the copy, not for what follows it, so that the device keeps busy.
    """

    def __init__(self, tensor: Tensor) -> None:
        # such a copy goes to page-locked memory
        self._host = tensor.detach().to("cpu", non_blocking=tensor.device.type in ASYNC_DEVICES)
        self._sent = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

    def read(self) -> Tensor:
        """The values, on the host."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._host
