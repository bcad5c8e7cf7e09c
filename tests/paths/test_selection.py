from __future__ import annotations

import itertools

import pytest
import torch

from rep_fast.errors import HparamError
from rep_fast.paths import NodeScores, NodeSet, layer_map, select

L, M = 2, 4


def make_scores(seed: int = 0, *, layers: int = L, width: int = M, integers: bool = False) -> NodeScores:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, layers, width)
    values = (
        torch.randint(0, 3, shape, generator=generator).double()
        if integers
        else torch.randn(shape, generator=generator).double()
    )
    return NodeScores(values[0], values[1], "sum", "up", (1.0,))


def all_paths(scores):
    """Every path with its score, best first."""
    lists = [own.tolist() for own in scores.lists()]
    return sorted(
        (
            sum(own[i] for own, i in zip(lists, nodes, strict=True))
            for nodes in itertools.product(*map(range, map(len, lists)))
        ),
        reverse=True,
    )


def path_score(scores, key, value):
    layers = range(scores.n_layers)
    return float(scores.key[layers, list(key)].sum() + scores.value[layers, list(value)].sum())


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("top", [1, 3, 17])
def test_kbest_paths_are_the_best_of_all(top, integers):
    for seed in range(5):
        scores = make_scores(seed, integers=integers)
        chosen = select(scores, top=top, mode="kbest")
        assert [path.score for path in chosen.paths] == pytest.approx(all_paths(scores)[:top], abs=1e-12)
        for path in chosen.paths:
            assert path.score == pytest.approx(path_score(scores, path.key, path.value), abs=1e-12)
        assert len({(path.key, path.value) for path in chosen.paths}) == top


def test_kbest_touches_few_nodes():
    scores = make_scores(layers=8, width=50)
    chosen = select(scores, top=15, mode="kbest")
    assert 2 * 8 <= chosen.positive.n_nodes <= 2 * 8 + 15 - 1
    assert set(chosen.positive.key[3]) == {path.key[3] for path in chosen.paths}
    assert set(chosen.positive.value[3]) == {path.value[3] for path in chosen.paths}


def test_per_list_takes_the_best_of_every_list():
    scores = make_scores(layers=3, width=20)
    chosen = select(scores, top=5)
    assert chosen.positive.n_nodes == 2 * 3 * 5
    assert chosen.paths == ()
    for layer in range(3):
        assert set(chosen.positive.value[layer]) == set(scores.value[layer].topk(5).indices.tolist())
        assert list(chosen.positive.key[layer]) == sorted(chosen.positive.key[layer])


def test_ties_go_to_the_lower_node():
    flat = NodeScores(torch.ones(1, 6), torch.ones(1, 6), "sum", "up", (0.0,))
    chosen = select(flat, top=2)
    assert chosen.positive == NodeSet(((0, 1),), ((0, 1),))
    assert chosen.negative == NodeSet(((0,),), ((0,),))


@pytest.mark.parametrize("mode", ["per_list", "kbest"])
def test_negative_path_is_the_lowest_of_all(mode):
    scores = make_scores(3)
    negative = select(scores, top=2, mode=mode).negative
    lowest = path_score(scores, [own[0] for own in negative.key], [own[0] for own in negative.value])
    assert negative.n_nodes == 2 * L
    assert lowest == pytest.approx(all_paths(scores)[-1], abs=1e-12)


def test_several_negative_nodes_per_list_and_several_lowest_paths():
    scores = make_scores(3)
    per_list = select(scores, top=1, bottom=2).negative
    for layer in range(L):
        assert set(per_list.key[layer]) == set((-scores.key[layer]).topk(2).indices.tolist())
    lowest = select(scores, top=1, bottom=3, mode="kbest").negative
    three = sorted(
        itertools.product(*([range(M)] * (2 * L))),
        key=lambda nodes: path_score(scores, nodes[0::2], nodes[1::2]),
    )[:3]
    for layer in range(L):
        assert set(lowest.key[layer]) == {nodes[2 * layer] for nodes in three}
        assert set(lowest.value[layer]) == {nodes[2 * layer + 1] for nodes in three}


def test_scores_of_some_layers():
    scores = make_scores(layers=3)
    some = scores.at([2, 0])
    assert some.n_layers == 2
    assert torch.equal(some.key[0], scores.key[2])
    assert torch.equal(some.value[1], scores.value[0])


def test_layer_map_means_over_selected_nodes():
    scores = make_scores(layers=3, width=10)
    nodes = NodeSet(((0, 4), (1,), ()), ((2,), (3, 5), (9,)))
    means = layer_map(scores, nodes)
    assert float(means.key[0]) == pytest.approx(float(scores.key[0, [0, 4]].mean()))
    assert float(means.value[1]) == pytest.approx(float(scores.value[1, [3, 5]].mean()))
    assert bool(means.key[2].isnan())


def test_options_are_checked():
    with pytest.raises(HparamError, match="mode='best'"):
        select(make_scores(), mode="best")
    for top in (0, M + 1):
        with pytest.raises(HparamError, match=f"top={top}"):
            select(make_scores(), top=top)
    for mode in ("per_list", "kbest"):
        with pytest.raises(HparamError, match="bottom=0"):
            select(make_scores(), top=1, bottom=0, mode=mode)
    with pytest.raises(HparamError, match="top=0"):
        select(make_scores(), top=0, mode="kbest")
