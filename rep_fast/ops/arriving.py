"""Values that a loop on a GPU shows to the host, read without draining the work that is queued there.

A loop that reads a number from every step, to learn whether it goes on, keeps the device idle between steps. Read one
step late, a number arrives while the next step runs; what that step makes is dropped where the number ends the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
# devices whose copies to the host can be waited for one by one
ASYNC_DEVICES = ("cuda",)


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


def lag_on(device: torch.device) -> int:
    """Steps that a loop queues before the host reads what an earlier one showed; on the CPU nothing is ever queued."""
    return int(device.type != "cpu")


class Late:
    """What each step of a loop shows, told to the host `lag` steps after it.

    device: where the loop runs, which says the lag; or lag: as given.
    """

    def __init__(self, device: torch.device, *, lag: int | None = None) -> None:
        self.lag = lag_on(device) if lag is None else lag
        self._underway: deque[Arriving] = deque()

    def after(self, shown: Tensor) -> Tensor | None:
        """Takes in what a step shows; what the step `lag` before it showed, None where there was none."""
        self._underway.append(Arriving(shown))
        return self._underway.popleft().read() if len(self._underway) > self.lag else None


def read_late(
    steps: Iterable[tuple[Made, Tensor]], *, ends: Callable[[Sequence[float]], bool] | None = None
) -> Iterator[tuple[Made, float]]:
    """What the steps of a loop made, each with its number on the host.

    Args:
        steps: (made, number []) of each step, made when it is asked for; later steps must leave it as it is.
        ends: whether, by the numbers known so far, the step underway is likely to end the loop: the host then waits for
            its number first, so that no step is made in vain.
    """
    known: list[float] = []
    underway: deque[tuple[Made, Arriving]] = deque()
    for made, number in steps:
        underway.append((made, Arriving(number)))
        lag = lag_on(number.device)
        while len(underway) > (0 if lag and ends is not None and ends(known) else lag):
            earlier, arriving = underway.popleft()
            known.append(float(arriving.read()))
            yield earlier, known[-1]
    for earlier, arriving in underway:
        yield earlier, float(arriving.read())
