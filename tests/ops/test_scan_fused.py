"""The fused body of the scan on a GPU: the same bits as the first body gives, and when it serves."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_bodies import executor, needs_gpu, serve_by_executor
from scan_checks import random_block, same_bits
from torch import Tensor

from rep_fast import errors
from rep_fast.ops import LastTokenExclusion, PairExclusion, ScanQueries, scan_fused, whitened_topk
from rep_fast.ops.scan_products import prepare_queries


@pytest.fixture(params=["cuda", "cuda-on-cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where tensors lie that the fused body serves, from their 20th key on and in short chunks."""
    monkeypatch.setattr(scan_fused, "_OPENING_ROWS", 20)
    monkeypatch.setattr(scan_fused, "_CHUNK_ROWS", 150)
    if request.param == "cuda":
        needs_gpu()
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a GPU of sm_90")
        return torch.device("cuda")
    serve_by_executor(monkeypatch, "whitened_topk")
    return torch.device("cpu")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Asks for the fused body; how many keys it was given, chunk by chunk."""
    rows: list[int] = []
    scan = scan_fused.FusedChunks.scan

    def counted(self: scan_fused.FusedChunks, chunk: Tensor, first_row: int, **given: Any) -> None:
        rows.append(len(chunk))
        scan(self, chunk, first_row, **given)

    monkeypatch.setattr(scan_fused.FusedChunks, "scan", counted)
    monkeypatch.setenv("REP_FAST_GPU_SCAN", "fused")
    return rows


def first_body(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setenv("REP_FAST_GPU_SCAN", "product")
        return whitened_topk(*arguments, **options)


def rules(n: int, m: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    tokens, last = (torch.randint(30, (size,), generator=generator).to(device) for size in (n, m))
    pairs = torch.randint(m, (3 * n,), generator=generator).to(device)
    return {
        "no rule": None,
        "last token": LastTokenExclusion(tokens, torch.arange(0, n, 37).to(device), last, window=4),
        "pairs": PairExclusion(torch.arange(0, 3 * n + 1, 3).to(device), pairs),
    }


# of keys in whole steps, as few as keep one multiprocessor busy
CHUNKS = {"bf16": [150, 150, 80], "bf16x2": [150, 150, 80], "int8": [128, 128, 124]}


@pytest.mark.parametrize("rule", ["no rule", "last token", "pairs"])
@pytest.mark.parametrize("precision", list(CHUNKS))
@pytest.mark.parametrize(("n_queries", "width", "k"), [(5, 64, 7), (9, 328, 3)])
def test_both_bodies_give_the_same_bits(
    device: torch.device,
    served: list[int],
    monkeypatch: pytest.MonkeyPatch,
    n_queries: int,
    width: int,
    k: int,
    precision: str,
    rule: str,
) -> None:
    keys, queries = (part.to(device) for part in random_block(400, n_queries, width, dtype=torch.bfloat16))
    options = {"precision": precision, "exclusion": rules(400, n_queries, device)[rule], "first_id": 70}
    found = whitened_topk(keys, queries, k, **options)
    assert served == CHUNKS[precision]
    assert same_bits(found, first_body(monkeypatch, keys, queries, k, **options))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_many_queries(device: torch.device, served: list[int], monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    keys, queries = (part.to(device) for part in random_block(60, 130, 24, dtype=torch.bfloat16))
    found = whitened_topk(keys, queries, 1, precision=precision)
    assert served == [40]
    assert same_bits(found, first_body(monkeypatch, keys, queries, 1, precision=precision))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_keys_in_whole_steps_may_be_of_any_type_and_layout(
    device: torch.device, served: list[int], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    keys, queries = random_block(200, 7, 37, dtype=dtype)
    keys[60, 3] = torch.inf
    keys, queries = torch.nn.functional.pad(keys, (0, 3)).to(device)[:, :37], queries.to(device)
    options = {"precision": "int8", "nonfinite": "exclude"}
    found = whitened_topk(keys, queries, 4, **options)
    assert served == [128, 52]
    assert found.n_nonfinite == 1
    assert same_bits(found, first_body(monkeypatch, keys, queries, 4, **options))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_what_a_stream_has_seen_opens_the_next_block(
    device: torch.device, served: list[int], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    keys, queries = (part.to(device) for part in random_block(40, 6, 48, dtype=torch.bfloat16))
    kept = ScanQueries(queries)

    def scanned() -> Any:
        state = None
        for first in range(0, 40, 8):  # none of them is longer than what opens a stream
            block = keys[first : first + 8]
            state = whitened_topk(block, kept, 4, state=state, first_id=first, precision=precision)
        return state

    found = scanned()
    assert served == [4, 8, 8]
    with monkeypatch.context() as patch:
        patch.setenv("REP_FAST_GPU_SCAN", "product")
        assert same_bits(found, scanned())


def test_lists_that_overflow_lose_nothing(
    device: torch.device, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, queries = (part.to(device) for part in random_block(300, 6, 40, dtype=torch.bfloat16))
    monkeypatch.setattr(scan_fused, "_LIST_BYTES", 4 * 6 * 2)  # two places for each query
    monkeypatch.setattr(scan_fused, "_CANDIDATES_PER_BETTER_KEY", 0)
    found = whitened_topk(keys, queries, 9)
    assert sum(served) == 280
    assert same_bits(found, first_body(monkeypatch, keys, queries, 9))


def test_a_stream_of_blocks_with_rows_that_are_not_finite(
    device: torch.device, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, queries = (part.to(device) for part in random_block(240, 6, 48, dtype=torch.bfloat16))
    keys[15, 3], keys[130, 7], keys[200] = torch.nan, torch.inf, -torch.inf
    queries[2, 5] = torch.nan
    kept = ScanQueries(queries)

    def scanned() -> Any:
        first = whitened_topk(keys[:120], kept, 4, nonfinite="exclude")
        return whitened_topk(keys[120:], kept, 4, nonfinite="exclude", state=first, first_id=120)

    found = scanned()
    assert sum(served) == 220  # all but the first twenty
    assert found.n_nonfinite == 3
    with monkeypatch.context() as patch:
        patch.setenv("REP_FAST_GPU_SCAN", "product")
        assert same_bits(found, scanned())
    with pytest.raises(errors.NonFiniteError, match=r"keys hold a NaN or infinity in row 10 \(id 130\)"):
        _ = whitened_topk(keys[120:], queries[:2], 4, state=None, first_id=120).ids


@pytest.mark.parametrize(
    "kind", ["float32 keys", "float16 keys", "odd width", "odd stride", "one row", "fp32", "fp64", "few keys"]
)
def test_what_it_does_not_take_the_first_body_serves(
    device: torch.device, served: list[int], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    dtype = {"float32 keys": torch.float32, "float16 keys": torch.float16}.get(kind, torch.bfloat16)
    keys, queries = random_block(60, 4, 36 if kind == "odd width" else 40, dtype=dtype)
    if kind == "odd stride":
        keys = torch.nn.functional.pad(keys, (0, 3))
    keys, queries = keys.to(device)[:, : queries.shape[1]], queries.to(device)
    keys = keys[:20] if kind == "few keys" else keys[:1].expand(60, -1) if kind == "one row" else keys
    precision = kind if kind in ("fp32", "fp64") else "auto"
    found = whitened_topk(keys, queries, 3, precision=precision)
    assert served == []
    assert same_bits(found, first_body(monkeypatch, keys, queries, 3, precision=precision))


def test_it_serves_nobody_who_did_not_ask(
    device: torch.device, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REP_FAST_GPU_SCAN")
    whitened_topk(*(part.to(device) for part in random_block(60, 4, 40, dtype=torch.bfloat16)), 3)
    assert served == []


def test_keys_on_the_host(monkeypatch: pytest.MonkeyPatch, served: list[int]) -> None:
    needs_gpu()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of sm_90")
    monkeypatch.setattr(scan_fused, "_STAGED_BYTES", 2 * 200 * 700)
    keys, queries = random_block(6000, 30, 200, dtype=torch.bfloat16)
    found = whitened_topk(keys, queries.cuda(), 8)
    assert served == [700, 700, 504]
    assert same_bits(found, first_body(monkeypatch, keys.cuda(), queries.cuda(), 8))


def test_rows_of_a_chunk() -> None:
    rows = torch.empty(1, 11008)
    bf16, module = prepare_queries(rows, "bf16", torch.bfloat16), ModuleType("nothing is asked of it")
    assert scan_fused.fused_rows(module, torch.empty(1, 11008).bfloat16(), bf16) == 1 << 16
    on_host = torch.empty(1, 11008, device="meta").bfloat16()
    assert scan_fused.fused_rows(module, on_host, bf16) == (1 << 28) // 22016


@pytest.mark.parametrize("n_queries", [1, 100, 128, 256, 257, 300, 400, 600, 2000, 20_000])
@pytest.mark.parametrize("n_multiprocessors", [1, 132])
def test_the_tiles_of_a_wave_run_at_once(n_queries: int, n_multiprocessors: int) -> None:
    module = executor()
    if module is None:
        pytest.skip("the CUDA executor is not built: pip install -e . builds it")
    tile = (module.fused_tile_keys, module.fused_tile_queries(n_queries))
    query_tiles = module.padded_queries(n_queries) // tile[1]
    key_tiles = scan_fused.rows_of_a_wave(n_queries, tile, n_multiprocessors) // tile[0]
    assert key_tiles == 1 or key_tiles * query_tiles <= n_multiprocessors
    assert (key_tiles + 1) * query_tiles > n_multiprocessors


def test_the_opening_lets_lists_hold_a_chunk() -> None:
    assert scan_fused._opening_rows(100, 1 << 16, 10) == 4096
    for n_queries, k in ((400, 1000), (20_000, 10)):
        opening, capacity = scan_fused._opening_rows(n_queries, 1 << 16, k), (32 << 20) // (4 * n_queries)
        assert 4096 < opening < 1 << 16
        assert 3.2 * k * (1 << 16) / opening < capacity


def test_a_body_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REP_FAST_GPU_SCAN", "best")
    with pytest.raises(errors.BackendError, match="must be one of product, fused, got 'best'"):
        scan_fused.is_fused_asked_for(torch.device("cpu"))
    monkeypatch.setenv("REP_FAST_GPU_SCAN", "fused")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(errors.BackendError, match="needs a GPU of sm_90, this is sm_80; unset it"):
        scan_fused.is_fused_asked_for(torch.device("cuda"))
