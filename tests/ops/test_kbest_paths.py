from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rep_fast.errors import HparamError, NonFiniteError
from rep_fast.ops import kbest_paths
from rep_fast.reference import kbest_paths as reference

scores_of_a_list = st.lists(st.integers(-3, 3), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(lists=st.lists(scores_of_a_list, min_size=1, max_size=5), n=st.integers(1, 40))
def test_scores_are_those_of_brute_force_with_ties_and_single_nodes(lists: list[list[int]], n: int) -> None:
    tensors = [torch.tensor(scores, dtype=torch.float32) for scores in lists]
    found = kbest_paths(tensors, n)
    wanted = reference.kbest_paths(tensors, n)
    assert [score for score, _ in found] == [score for score, _ in wanted]
    assert len({nodes for _, nodes in found}) == len(found)
    for score, nodes in found:
        assert score == math.fsum(lists[p][node] for p, node in enumerate(nodes))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n_lists=st.integers(1, 5), n=st.integers(1, 30))
def test_paths_are_those_of_brute_force_without_ties(seed: int, n_lists: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lists = [torch.randn(4, dtype=torch.float64, generator=generator) for _ in range(n_lists)]
    assert kbest_paths(lists, n) == reference.kbest_paths(lists, n)


def test_second_choices_whose_prices_round_to_one_number() -> None:
    """1e16 − 1 and 1e16 − 0 are one float64, the scores 1 and 0 of the paths are not."""
    lists = [torch.tensor(scores, dtype=torch.float64) for scores in ([1e16, 0.0], [1e16, 1.0], [-1e16])]
    assert kbest_paths(lists, 4) == reference.kbest_paths(lists, 4)


def test_paths_touch_few_nodes_and_come_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    n_layers, n = 32, 15
    lists = [torch.randn(19_000, generator=generator) for _ in range(2 * n_layers)]
    found = kbest_paths(lists, n)
    touched = {(p, node) for _, nodes in found for p, node in enumerate(nodes)}
    assert len(touched) <= 2 * n_layers + n - 1
    scores = [score for score, _ in found]
    assert scores == sorted(scores, reverse=True)
    assert found[0][1] == tuple(int(scores.argmax()) for scores in lists)


def test_lower_node_wins_a_tie_inside_a_list() -> None:
    found = kbest_paths([torch.tensor([1.0, 5.0, 5.0, 5.0])], 2)
    assert found == [(5.0, (1,)), (5.0, (2,))]


def test_fewer_paths_than_asked_for() -> None:
    assert len(kbest_paths([torch.ones(2), torch.ones(1), torch.ones(3)], 100)) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    assert kbest_paths([torch.tensor([1, 4, 2]).to(dtype)], 1) == [(4.0, (1,))]


@pytest.mark.parametrize(
    ("lists", "n", "error", "message"),
    [
        ([torch.ones(2)], 0, HparamError, "n must be at least 1, got 0"),
        ([], 1, HparamError, "lists is empty"),
        ([torch.ones(2), torch.ones(0)], 1, HparamError, r"list 1 must be \(nodes,\) and not empty, got \(0,\)"),
        ([torch.ones(2, 2)], 1, HparamError, r"list 0 must be .* got \(2, 2\)"),
        ([torch.tensor([0.0, math.nan])], 1, NonFiniteError, "list 0 holds nan at node 1"),
        ([torch.ones(1), torch.tensor([-math.inf])], 1, NonFiniteError, "list 1 holds -inf at node 0"),
    ],
)
def test_errors(lists: list[torch.Tensor], n: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kbest_paths(lists, n)
