"""The collision scan on a GPU: bounds of its products, chunks, states nobody has read yet."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from cuda_bodies import needs_gpu, serve_by_executor
from scan_checks import DTYPES, random_block, same_bits
from torch import Tensor

import rep_fast
from rep_fast import errors
from rep_fast.ops import ScanQueries, TopK, native, scan_on_gpu, whitened_topk
from rep_fast.ops.scan_products import approximate_scores, choose_chunk_rows, prepare_queries
from rep_fast.ops.unread_topk import UnreadTopK


@pytest.fixture(params=["cuda", "cuda-on-cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where tensors lie that the CUDA body serves."""
    if request.param == "cuda":
        needs_gpu()
        return torch.device("cuda")
    serve_by_executor(monkeypatch, "whitened_topk")
    return torch.device("cpu")


def hostile(n: int, width: int, kind: str, generator: torch.Generator) -> Tensor:
    values = torch.randn(n, width, generator=generator)
    scale = {"normal": 1.0, "tiny": 1e-25, "subnormal": 1e-40, "huge": 1e19}[kind]
    return values * scale * torch.logspace(0, -6, width)


@pytest.mark.parametrize("kind", ["normal", "tiny", "subnormal", "huge"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scan_pass", ["fp32", "bf16", "bf16x2"])
@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_products_keep_their_bounds(place: str, scan_pass: str, dtype: torch.dtype, kind: str) -> None:
    if scan_pass == "bf16" and dtype != torch.bfloat16:
        return  # refused at the op's door
    if place == "cuda":
        needs_gpu()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        keys = hostile(70, 333, kind if dtype != torch.float16 else "normal", generator).to(dtype).to(place)
        rows = hostile(9, 333, kind, generator).to(place)
        queries = prepare_queries(rows, scan_pass, dtype)
        buffer = torch.empty(4 * 9 * 70, device=place)
        error = (approximate_scores(queries, keys, buffer).double() - rows.double() @ keys.double().T).abs()
        allowed = queries.margins.double().unsqueeze(1) * keys.double().norm(dim=1) + queries.slacks.double().unsqueeze(
            1
        )
        # an overflow to infinity or NaN tells nothing, and the kernel takes it so
        assert ((error <= allowed) | ~torch.isfinite(error)).all()
        assert torch.isfinite(allowed).all()


def test_margins_are_no_wider_than_the_rounding_they_stand_for() -> None:
    rows = torch.randn(20, 4096, generator=torch.Generator().manual_seed(0))
    norms = rows.norm(dim=1)
    accumulation = 4096 * 2.0**-22
    assert (prepare_queries(rows, "bf16", torch.bfloat16).margins / norms < 2.0**-9 + 1.1 * accumulation).all()
    assert (prepare_queries(rows, "bf16x2", torch.bfloat16).margins / norms < 2.0**-17 + 1.1 * accumulation).all()
    assert (prepare_queries(rows, "fp64", torch.bfloat16).margins == math.inf).all()


def test_a_query_that_is_not_finite_has_no_margin() -> None:
    rows = torch.ones(4, 5)
    rows[1, 2], rows[2, 0] = torch.nan, -torch.inf
    rows[3, 1] = 3.4e38  # rounds to infinity in bfloat16, which is no reason to drop it
    for scan_pass in ("fp64", "fp32", "bf16", "bf16x2"):
        queries = prepare_queries(rows, scan_pass, torch.bfloat16)
        assert queries.margins.isnan().tolist() == queries.dropped.tolist() == [False, True, True, False]


@pytest.mark.parametrize("n_queries", [1, 100, 400, 20_000])
def test_scores_of_a_chunk_stay_in_half_of_the_cache(n_queries: int) -> None:
    cache = 60 << 20
    rows = choose_chunk_rows(n_queries, 1, 11008, copied_bytes=0, cache_bytes=cache)
    assert rows % 256 == 0
    assert rows == 256 or 4 * n_queries * rows <= cache // 2
    assert rows == 65536 or 4 * n_queries * (rows + 256) > cache // 2
    split = choose_chunk_rows(n_queries, 2, 11008, copied_bytes=4, cache_bytes=cache)
    assert split <= rows
    assert split * 11008 * 4 <= 1 << 26


@pytest.mark.parametrize("precision", ["auto", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_matter(
    device: torch.device, dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, queries = (part.to(device) for part in random_block(300, 5, 40, dtype=dtype))
    whole = whitened_topk(keys, queries, 7, precision=precision)
    monkeypatch.setattr(scan_on_gpu, "choose_chunk_rows", lambda *_, **__: 37)
    assert same_bits(whitened_topk(keys, queries, 7, precision=precision), whole)


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_blocks_follow_each_other_unread(device: torch.device, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = (part.to(device) for part in random_block(90, 4, 16))
    want = whitened_topk(keys, queries, 5)
    kept = ScanQueries(queries)
    settle = UnreadTopK._settled
    monkeypatch.setattr(UnreadTopK, "_settled", lambda _: pytest.fail("somebody read the state"))
    state: TopK | None = None
    for start in range(0, 90, 30):
        block = keys[start : start + 30]
        state = whitened_topk(block, kept, 5, state=state, first_id=start, precision=precision)
    assert state is not None
    assert (state.k, state.n_keys_seen, sum(state.pass_counts)) == (5, 90, 90)
    monkeypatch.setattr(UnreadTopK, "_settled", settle)
    assert same_bits(state, want)
    assert same_bits(pickle.loads(pickle.dumps(state)), want)
    assert type(pickle.loads(pickle.dumps(state))) is TopK


def test_a_bad_key_is_named_when_the_result_is_read(device: torch.device) -> None:
    keys, queries = (part.to(device) for part in random_block(90, 4, 16))
    keys[47, 3] = torch.nan
    keys[70] = torch.inf
    state: TopK | None = None
    for start in range(0, 90, 30):
        state = whitened_topk(keys[start : start + 30], queries, 5, state=state, first_id=100 + start)
    assert state is not None
    message = r"keys hold a NaN or infinity in row 17 \(id 147\)"
    for read in (lambda: state.ids, lambda: state.scores, state.to_tensors, lambda: state.merge(TopK.empty(4, 5))):
        with pytest.raises(errors.NonFiniteError, match=message):
            read()


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_no_block_waits_for_the_device(precision: str) -> None:
    needs_gpu()
    keys, queries = (part.cuda() for part in random_block(5000, 40, 256, dtype=torch.bfloat16))
    kept = ScanQueries(queries)
    state = whitened_topk(keys, kept, 5, precision=precision)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in range(1, 4):
            state = whitened_topk(keys, kept, 5, state=state, first_id=5000 * block, precision=precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.n_nonfinite == 0


@pytest.mark.parametrize("precision", ["auto", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_on_the_host_are_copied_while_others_are_worked_on(
    dtype: torch.dtype, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_gpu()
    keys, queries = random_block(4099, 30, 200, dtype=dtype)
    want = whitened_topk(keys.cuda(), queries.cuda(), 8)
    monkeypatch.setattr(scan_on_gpu, "choose_chunk_rows", lambda *_, **__: 500)
    for given in (queries.cuda(), ScanQueries(queries.cuda())):
        assert same_bits(whitened_topk(keys, given, 8, precision=precision), want)


# ---- which body serves -----------------------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], module: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(native, "find_cuda", lambda: native.Native(module, "the test hides it"))


class _Module:
    bodies = ("whitened_topk",)


@pytest.mark.parametrize(
    ("capability", "module", "name", "reason"),
    [
        ((9, 0), _Module, "cuda-sm90", "CUDA kernels serve tensors on this GPU by their body 'product'"),
        ((7, 5), _Module, "reference", "this GPU is sm_75, and the CUDA kernels need sm_80 or newer"),
        ((9, 0), None, "reference", "the test hides it"),
    ],
)
def test_the_body_for_a_gpu(
    capability: tuple[int, int], module: Any, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, module)
    told = rep_fast.backend("cuda")
    assert told["whitened_topk"] == (name, reason)
    assert told["kbest_paths"][0] == "reference"


def test_the_body_that_was_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), _Module)
    monkeypatch.setenv("REP_FAST_GPU_SCAN", "fused")
    assert rep_fast.backend("cuda")["whitened_topk"][1].endswith("by their body 'fused'")
    monkeypatch.setenv("REP_FAST_GPU_SCAN", "")  # as not set
    assert rep_fast.backend("cuda")["whitened_topk"][1].endswith("by their body 'product'")


@pytest.mark.parametrize("variable", ["REP_FAST_GPU_SCAN", "REP_FAST_GPU_MOMENT"])
def test_a_body_that_nobody_has_is_refused_without_a_gpu_too(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "bogus")
    with pytest.raises(errors.BackendError, match=f"{variable}: must be one of .*, got 'bogus'"):
        rep_fast.backend()
