"""What the ops did: arithmetic, traffic and time of each call, recorded while a profile is open.

with rep_fast.ops.profile() as calls:
    whitened_topk(keys, queries, 10)
calls[0].flops / calls[0].elapsed
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Call:
    """One call of an op: floating-point operations, bytes it must read and write, elapsed time in seconds."""

    op: str
    backend: str
    flops: int
    bytes: int
    elapsed: float


_open_profile: ContextVar[list[Call] | None] = ContextVar("rep_fast_profile", default=None)


@contextmanager
def profile() -> Iterator[list[Call]]:
    """Collect a `Call` per op called in this thread; an inner profile hides its calls from the outer one."""
    calls: list[Call] = []
    token = _open_profile.set(calls)
    try:
        yield calls
    finally:
        _open_profile.reset(token)


@contextmanager
def recorded(op: str, backend: str, *, flops: int, bytes: int, device: torch.device | None = None) -> Iterator[None]:
    """Time the body of an op and hand the call to the open profile; free of cost when none is open.

    Only with an open profile is a GPU waited for, before and after.
    """
    calls = _open_profile.get()
    if calls is None:
        yield
        return
    is_on_gpu = device is not None and device.type == "cuda"
    if is_on_gpu:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield
    if is_on_gpu:
        torch.cuda.synchronize(device)
    calls.append(Call(op, backend, flops, bytes, time.perf_counter() - start))
