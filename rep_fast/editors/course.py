"""The course of a training that leaves batches alone once they hold and ends by itself (methods §5.8, §7.5).

Both are worked out on the device, from losses that the host has not seen. The host learns of the end when it has queued
the next batch already, in which nothing moves any more: the result is that of learning it at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rep_fast.ops.arriving import Late


class Course:
    """Batches of a training, pass after pass; device: of what they say."""

    def __init__(self, device: torch.device) -> None:
        self._late = Late(device)
        self._is_over = torch.zeros((), dtype=torch.bool, device=device)
        self._left_alone: list[Tensor] = []
        self._n_batches: list[int] = []  # of each pass, counted from the start
        self._overs: list[Tensor] = []

    def enter(self, holds: Tensor | None) -> bool | Tensor:
        """Takes in whether the next batch holds, bool [], None: no batch ever does.

        Returns:
            Whether the batch is left alone, for it holds or all is over: on the CPU known, elsewhere a flag.
        """
        self._left_alone.append(self._is_over if holds is None else self._is_over | holds)
        if holds is None:
            return False
        return self._left_alone[-1] if self._late.lag else bool(self._left_alone[-1])

    def end_pass(self, is_over: Tensor | None = None) -> None:
        """Takes in whether the training ends with this pass, bool []; None: it does if every batch was left alone."""
        if is_over is None:
            begin = self._n_batches[-1] if self._n_batches else 0
            is_over = torch.stack(self._left_alone[begin:]).all()
        self._n_batches.append(len(self._left_alone))
        self._is_over = self._is_over | is_over
        self._overs.append(self._is_over)

    def has_ended(self) -> bool:
        """Whether the host knows that it is over; to be asked once after every batch."""
        told = self._late.after(self._is_over)
        return told is not None and bool(told)

    def is_over(self) -> bool:
        """Whether it is over; the host waits for the device."""
        return bool(self._is_over)

    def told(self) -> tuple[int, int]:
        """Passes up to the one it ended with, and updates made in them."""
        overs = torch.stack(self._overs).tolist()
        n_passes = min(overs.count(False) + 1, len(overs))
        left_alone = torch.stack(self._left_alone[: self._n_batches[n_passes - 1]]).tolist()
        return n_passes, left_alone.count(False)
