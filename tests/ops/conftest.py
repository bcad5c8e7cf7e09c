"""Fixtures of the kernel tests: every instruction set of this machine, and torch left as it was."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_bodies import needs_gpu, serve_all_by_executor, serve_by_executor
from scan_checks import FORCED, bodies
from torch import Tensor

from rep_fast.ops import native

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")


def machine_levels() -> list[str]:
    """The instruction sets the native module can run here; none where it is not built."""
    module = native.find().module
    return [] if module is None else list(LEVELS[: module.machine_level() + 1])


@pytest.fixture(params=[*machine_levels(), "reference", "cuda-on-cpu"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every body of an op in turn: the native ones by `REP_FAST_ISA`, plain torch without the native module, and the
    CUDA kernels' source on the CPU."""
    if request.param == "reference":
        monkeypatch.setattr(native, "find", lambda: native.Native(None, "the test hides it"))
    elif request.param == "cuda-on-cpu":
        serve_all_by_executor(monkeypatch)
    else:
        monkeypatch.setenv("REP_FAST_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def before_unreadable_page() -> Callable[[Tensor], Tensor]:
    """Makes a copy of a tensor whose last element ends at a page that may not be read."""

    def copied(values: Tensor) -> Tensor:
        n_bytes = values.numel() * values.element_size()
        n_pages = -(-n_bytes // mmap.PAGESIZE)
        memory = mmap.mmap(-1, (n_pages + 1) * mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + n_pages * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        no_access = 0
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), no_access) == 0
        offset = n_pages * mmap.PAGESIZE - n_bytes
        copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
        return copy.copy_(values)

    return copied


@pytest.fixture(params=bodies())
def scan_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every body of the scan in turn, with every pass that the level alone has; the level's name."""
    name, _, forced = request.param.partition(" ")
    if name == "reference":
        monkeypatch.setattr(native, "find", lambda: native.Native(None, "the test hides it"))
    elif name == "cuda":
        needs_gpu()
        monkeypatch.setitem(FORCED, "device", "cuda")
    elif name == "cuda-on-cpu":
        serve_by_executor(monkeypatch, "whitened_topk")
    else:
        monkeypatch.setenv("REP_FAST_ISA", name)
    monkeypatch.setitem(FORCED, "bfloat16", forced or "auto")
    return name
