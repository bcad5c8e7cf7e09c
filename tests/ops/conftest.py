"""Fixtures of the kernel tests: every instruction set of this machine, and torch left as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rep_fast.ops import native

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")


def machine_levels() -> list[str]:
    """The instruction sets the native module can run here; none where it is not built."""
    module = native.find().module
    return [] if module is None else list(LEVELS[: module.machine_level() + 1])


@pytest.fixture(params=[*machine_levels(), "reference"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every body of an op in turn: the native ones by `REP_FAST_ISA`, and plain torch without the native module."""
    if request.param == "reference":
        monkeypatch.setattr(native, "find", lambda: native.Native(None, "the test hides it"))
    else:
        monkeypatch.setenv("REP_FAST_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
