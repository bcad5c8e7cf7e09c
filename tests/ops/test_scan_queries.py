from __future__ import annotations

import pickle

import pytest
import torch
from scan_checks import random_block, same_bits

from rep_fast.errors import HparamError
from rep_fast.ops import LastTokenExclusion, ScanQueries, native, profile, whitened_topk

pytestmark = pytest.mark.filterwarnings("ignore:whitened_topk. the plain torch body serves")


@pytest.mark.parametrize("precision", ["auto", "fp64", "fp32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_queries_give_the_same_hits(precision: str, dtype: torch.dtype) -> None:
    if precision == "int8" and "avx512_bf16" not in native.levels(native.find().module):
        pytest.skip("needs AVX-512 VNNI")
    keys, queries = random_block(500, 19, 70, dtype=dtype)
    kept = ScanQueries(queries)
    fed = None
    for start in range(0, 500, 130):
        block = keys[start : start + 130]
        rule = LastTokenExclusion(torch.arange(len(block)), torch.tensor([0]), torch.arange(19), window=2)
        fed = whitened_topk(block, kept, 6, exclusion=rule, state=fed, first_id=start, precision=precision, seed=start)
    want = None
    for start in range(0, 500, 130):
        block = keys[start : start + 130]
        rule = LastTokenExclusion(torch.arange(len(block)), torch.tensor([0]), torch.arange(19), window=2)
        want = whitened_topk(block, queries, 6, exclusion=rule, state=want, first_id=start, precision="fp64")
    assert fed is not None
    assert want is not None
    assert same_bits(fed, want)


def test_queries_are_copied_and_serve_every_body(scan_level: str) -> None:
    keys, queries = random_block(90, 7, 40)
    want = whitened_topk(keys, queries, 5)
    kept = ScanQueries(queries)
    queries.zero_()
    assert len(kept) == 7
    for own in (kept, kept, pickle.loads(pickle.dumps(kept))):
        assert same_bits(whitened_topk(keys, own, 5), want)


def test_dropped_queries_are_told_each_time() -> None:
    keys, queries = random_block(30, 4, 10)
    queries[2, 3] = torch.nan
    kept = ScanQueries(queries)
    for _ in range(2):
        assert whitened_topk(keys, kept, 2, nonfinite="exclude").dropped_queries.nonzero().tolist() == [[2]]


def test_the_call_is_profiled() -> None:
    keys, queries = random_block(30, 4, 10)
    with profile() as calls:
        whitened_topk(keys, ScanQueries(queries), 2)
    assert [call.flops for call in calls] == [2 * 30 * 4 * 10]


@pytest.mark.parametrize("queries", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.float64)])
def test_queries_that_are_no_float32_matrix(queries: torch.Tensor) -> None:
    with pytest.raises(HparamError, match=r"queries must be \(queries, width\) float32, got"):
        ScanQueries(queries)
