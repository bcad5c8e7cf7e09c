"""The Hopper bodies of accumulate_moment: against float64, and when they serve."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_bodies import needs_gpu, serve_by_executor
from moment_checks import HALVES, assert_is_moment, random_keys

from rep_fast import errors
from rep_fast.ops import MomentSum, accumulate_moment, moment_on_gpu, native

# (tokens, width): beside the tiles of 128 and 192, the stage of 64 tokens, the chain of 512 and the sum of 4096
SHAPES = ((1, 8), (63, 136), (65, 384), (515, 24), (4161, 72))


@pytest.fixture(params=["wgmma128", "wgmma192"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Asks for each of the Hopper bodies in turn."""
    monkeypatch.setenv("REP_FAST_GPU_MOMENT", request.param)
    return request.param


@pytest.fixture(params=["cuda", "cuda-on-cpu"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Serves tensors, of a GPU or of the CPU."""
    if request.param == "cuda":
        needs_gpu()
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a GPU of sm_90")
        found = native.find_cuda().module
    else:
        found = serve_by_executor(monkeypatch, "accumulate_moment").module
    assert found is not None
    return found


@pytest.fixture
def device(module: ModuleType) -> torch.device:
    """Where the tensors lie that `module` serves."""
    return torch.device("cpu" if "on_cpu" in module.__name__ else "cuda")


@pytest.fixture
def served(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tile of every call that went to a Hopper body."""
    tiles: list[int] = []
    accumulate = module.accumulate_moment_by_wgmma

    def counted(*, tile_columns: int, **given: Any) -> None:
        tiles.append(tile_columns)
        accumulate(tile_columns=tile_columns, **given)

    monkeypatch.setattr(module, "accumulate_moment_by_wgmma", counted)
    return tiles


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_against_float64(
    device: torch.device, body: str, served: list[int], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    keys = random_keys(*shape, dtype)
    total = MomentSum.zeros(shape[1], device=device)
    total.lower += torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(1)).to(device)
    before = total.lower.cpu().clone()
    accumulate_moment(total, keys.to(device))
    assert served == [int(body.removeprefix("wgmma"))]
    assert total.count == shape[0]
    assert_is_moment(total, before, keys)
    assert torch.equal(total.lower.cpu().triu(1), before.triu(1))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_padded_rows_columns_and_mask(device: torch.device, body: str, served: list[int], dtype: torch.dtype) -> None:
    padded = random_keys(2 * 71, 64, dtype).to(device)
    keys, mask = padded[::2, 8:59], torch.arange(71, device=device) % 3 == 1
    nothing = torch.zeros(51, 51, dtype=torch.float64)
    whole, masked = (MomentSum.zeros(51, device=device) for _ in range(2))
    assert_is_moment(accumulate_moment(whole, keys), nothing, keys.cpu())
    assert_is_moment(accumulate_moment(masked, keys, mask=mask), nothing, keys[mask].cpu())
    assert masked.count == int(mask.sum())
    assert len(served) == 2


def test_nonfinite_keys_add_nothing(device: torch.device, body: str, served: list[int]) -> None:
    keys = random_keys(200, 136, torch.bfloat16)
    keys[40, 4], keys[64:128], keys[199, 135] = torch.nan, torch.inf, -torch.inf
    total = MomentSum.zeros(136, device=device)
    accumulate_moment(total, keys.to(device), nonfinite="exclude")
    kept = torch.isfinite(keys).all(dim=1)
    assert (total.count, total.n_nonfinite) == (134, 66)
    assert_is_moment(total, torch.zeros(136, 136, dtype=torch.float64), keys[kept])
    assert len(served) == 1


@pytest.mark.parametrize("kind", ["float32 keys", "odd width", "odd begin", "one key for all", "no keys"])
def test_what_it_does_not_take_the_first_body_serves(
    device: torch.device, body: str, served: list[int], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    dtype = torch.float32 if kind == "float32 keys" else torch.bfloat16
    keys = random_keys(30, 36 if kind == "odd width" else 40, dtype).to(device)
    views = {"odd begin": keys[:, 1:], "one key for all": keys[:1].expand(30, -1), "no keys": keys[:0]}
    keys = views.get(kind, keys)
    found, first = (MomentSum.zeros(keys.shape[1], device=device) for _ in range(2))
    accumulate_moment(found, keys)
    monkeypatch.setenv("REP_FAST_GPU_MOMENT", "mma")
    accumulate_moment(first, keys)
    assert served == []
    assert torch.equal(found.lower, first.lower)


def test_it_serves_nobody_who_did_not_ask(
    device: torch.device, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REP_FAST_GPU_MOMENT", raising=False)
    accumulate_moment(MomentSum.zeros(40, device=device), random_keys(30, 40, torch.bfloat16).to(device))
    assert served == []


def test_a_body_that_is_not_there_is_refused(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, lower = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(8, 8, dtype=torch.float64)
    monkeypatch.setenv("REP_FAST_GPU_MOMENT", "wgmma")
    with pytest.raises(errors.BackendError, match="must be one of mma, wgmma128, wgmma192, got 'wgmma'"):
        moment_on_gpu.accumulate_on_gpu(module, lower, keys, None)
    monkeypatch.setenv("REP_FAST_GPU_MOMENT", "wgmma128")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(errors.BackendError, match="'wgmma128' needs a GPU of sm_90, this is sm_80; unset it"):
        moment_on_gpu.asked_gpu_body("accumulate_moment", torch.device("cuda"))
