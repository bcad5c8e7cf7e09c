"""Running states of the collision scan: blocks, threads, merges."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scan_checks import DTYPES, random_block, same_bits, whitened_topk
from torch import Tensor

from rep_fast.ops import TopK

pytestmark = pytest.mark.filterwarnings("ignore:whitened_topk. the plain torch body serves")


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, list[int]]:
    """Small integer keys (many ties), queries, k, and the cuts of the stream into blocks."""
    n, m, width = draw(st.integers(1, 130)), draw(st.integers(1, 20)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    keys = torch.randint(-2, 3, (n, width), generator=generator).to(draw(st.sampled_from(DTYPES)))
    queries = torch.randint(-2, 3, (m, width), generator=generator).float()
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return keys, queries, draw(st.integers(1, 12)), [0, *cuts, n]


@given(streams(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_blocks_and_threads_do_not_matter(stream: tuple[Tensor, Tensor, int, list[int]], n_threads: int) -> None:
    keys, queries, k, cuts = stream
    before = torch.get_num_threads()
    want = whitened_topk(keys, queries, k)
    fed, merged = TopK.empty(queries.shape[0], k), TopK.empty(queries.shape[0], k)
    try:
        torch.set_num_threads(n_threads)
        for start, end in itertools.pairwise(cuts):
            fed = whitened_topk(keys[start:end], queries, k, state=fed, first_id=start)
            merged = whitened_topk(keys[start:end], queries, k, first_id=start).merge(merged)
    finally:
        torch.set_num_threads(before)
    assert same_bits(fed, want)
    assert same_bits(merged, want)


@given(streams())
@settings(max_examples=30, deadline=None)
def test_merge_is_associative_and_commutative(stream: tuple[Tensor, Tensor, int, list[int]]) -> None:
    keys, queries, k, cuts = stream
    thirds = [0, min(cuts), len(keys) // 2, len(keys)]
    a, b, c = (whitened_topk(keys[start:end], queries, k, first_id=start) for start, end in itertools.pairwise(thirds))
    assert same_bits(a.merge(b), b.merge(a))
    assert same_bits(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert same_bits(a.merge(TopK.empty(queries.shape[0], k)), a)


@given(streams(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_order_of_keys_changes_only_ids(stream: tuple[Tensor, Tensor, int, list[int]], seed: int) -> None:
    keys, queries, k, _ = stream
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    result, permuted = whitened_topk(keys, queries, k), whitened_topk(keys[order], queries, k)
    assert torch.equal(result.exact_scores, permuted.exact_scores)
    for row, ids in enumerate(permuted.ids):
        there = ids[ids >= 0]
        assert there.unique().numel() == there.numel()
        scores = keys[order[there]].double() @ queries[row].double()
        assert torch.equal(scores, permuted.exact_scores[row, : there.numel()])


@given(streams())
@settings(max_examples=30, deadline=None)
def test_more_keys_never_lower_a_score(stream: tuple[Tensor, Tensor, int, list[int]]) -> None:
    keys, queries, k, cuts = stream
    fewer, all_keys = whitened_topk(keys[: cuts[-2]], queries, k), whitened_topk(keys, queries, k)
    assert (all_keys.exact_scores >= fewer.exact_scores).all()


def test_state_goes_through_safetensors() -> None:
    keys, queries = random_block(20, 3, 8)
    keys[4, 2] = torch.nan
    result = whitened_topk(keys, queries, 30, nonfinite="exclude")
    assert same_bits(TopK.from_tensors(load(save(result.to_tensors()))), result)


def test_state_is_not_changed(scan_level: str) -> None:
    keys, queries = random_block(20, 3, 8)
    state = whitened_topk(keys, queries, 4)
    copy = TopK.from_tensors({name: t.clone() for name, t in state.to_tensors().items()})
    whitened_topk(keys * 2, queries, 4, state=state, first_id=20)
    assert same_bits(state, copy)
