"""Which nodes a path edit may touch: the best of every list, or the nodes of the exact best paths (methods §7.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast import ops
from rep_fast.errors import HparamError
from rep_fast.paths.node_scores import NodeScores

MODES = ("per_list", "kbest")


@dataclass(frozen=True)
class NodeSet:
    """Node numbers per layer, ascending, without repeats."""

    key: tuple[tuple[int, ...], ...]
    value: tuple[tuple[int, ...], ...]

    @property
    def n_nodes(self) -> int:
        """How many nodes there are over all layers."""
        return sum(len(own) for own in (*self.key, *self.value))


@dataclass(frozen=True)
class Path:
    """One node per list: `key[layer]` and `value[layer]`, and the sum of their scores."""

    score: float
    key: tuple[int, ...]
    value: tuple[int, ...]


@dataclass(frozen=True)
class PathSelection:
    """What a path edit works on.

    Attributes:
        positive: nodes that carry the fact.
        negative: the nodes of lowest score, by default one per list, which keep the unedited model's own prediction.
        paths: the best paths in order of score; empty for mode "per_list".
        mode, top: how they were selected.
    """

    positive: NodeSet
    negative: NodeSet
    paths: tuple[Path, ...]
    mode: str
    top: int


@dataclass(frozen=True)
class LayerMap:
    """Mean score of the selected nodes per layer, [L] each; NaN where a layer has none."""

    key: Tensor
    value: Tensor


def select(scores: NodeScores, *, top: int = 15, bottom: int = 1, mode: str = "per_list") -> PathSelection:
    """Select nodes by score.

    "per_list" takes the `top` best nodes of each of the 2L lists (2L·top nodes); "kbest" the union of the exact `top`
    best paths (at most 2L + top − 1 nodes). Negative are likewise the `bottom` lowest nodes of every list, or the union
    of the `bottom` lowest paths; with bottom=1 both are the lowest node of every list. Ties: the lower node number.

    Raises:
        HparamError: unknown mode, or top or bottom out of range.
    """
    if mode not in MODES:
        raise HparamError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    width = scores.key.shape[1]
    for name, count in (("top", top), ("bottom", bottom)):
        if count < 1 or (mode == "per_list" and count > width):
            raise HparamError(f"{name}={count} is out of range; choose 1 to {width}, the width of a list")
    if mode == "per_list":
        positive = NodeSet(_best(scores.key, top), _best(scores.value, top))
        negative = NodeSet(_best(-scores.key, bottom), _best(-scores.value, bottom))
        return PathSelection(positive, negative, (), mode, top)
    found, lowest = _paths(scores.lists(), top), _paths([-own for own in scores.lists()], bottom)
    return PathSelection(_nodes_of(found), _nodes_of(lowest), found, mode, top)


def layer_map(scores: NodeScores, nodes: NodeSet) -> LayerMap:
    """Mean score of the given nodes per layer, key- and value-nodes apart: the rows of a heat map over layers."""
    return LayerMap(_means(scores.key, nodes.key), _means(scores.value, nodes.value))


def _best(scores: Tensor, top: int) -> tuple[tuple[int, ...], ...]:
    ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return tuple(tuple(sorted(row)) for row in ranked.tolist())


def _paths(lists: list[Tensor], count: int) -> tuple[Path, ...]:
    # the lists alternate key and value
    return tuple(Path(score, nodes[0::2], nodes[1::2]) for score, nodes in ops.kbest_paths(lists, count))


def _nodes_of(paths: tuple[Path, ...]) -> NodeSet:
    layers = range(len(paths[0].key))
    return NodeSet(
        key=tuple(tuple(sorted({path.key[layer] for path in paths})) for layer in layers),
        value=tuple(tuple(sorted({path.value[layer] for path in paths})) for layer in layers),
    )


def _means(scores: Tensor, nodes: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([row[list(own)].mean() for row, own in zip(scores, nodes, strict=True)])
