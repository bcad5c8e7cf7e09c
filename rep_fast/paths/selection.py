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
        negative: the path of lowest score, one node per list, which keeps the unedited model's own prediction.
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


def select(scores: NodeScores, *, top: int = 15, mode: str = "per_list") -> PathSelection:
    """Select nodes by score.

    "per_list" takes the `top` best nodes of each of the 2L lists (2L·top nodes); "kbest" the union of the exact `top`
    best paths (at most 2L + top − 1 nodes). Ties go to the lower node number. The negative path takes the lowest node
    of every list.

    Raises:
        HparamError: unknown mode, or top out of range.
    """
    if mode not in MODES:
        raise HparamError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    width = scores.key.shape[1]
    if top < 1 or (mode == "per_list" and top > width):
        raise HparamError(f"top={top} is out of range; choose 1 to {width}, the width of a list")
    negative = NodeSet(_lowest(scores.key), _lowest(scores.value))
    if mode == "per_list":
        return PathSelection(NodeSet(_best(scores.key, top), _best(scores.value, top)), negative, (), mode, top)
    # lists() alternates key and value
    found = [Path(score, nodes[0::2], nodes[1::2]) for score, nodes in ops.kbest_paths(scores.lists(), top)]
    positive = NodeSet(
        key=tuple(tuple(sorted({path.key[layer] for path in found})) for layer in range(scores.n_layers)),
        value=tuple(tuple(sorted({path.value[layer] for path in found})) for layer in range(scores.n_layers)),
    )
    return PathSelection(positive, negative, tuple(found), mode, top)


def layer_map(scores: NodeScores, nodes: NodeSet) -> LayerMap:
    """Mean score of the given nodes per layer, key- and value-nodes apart: the rows of a heat map over layers."""
    return LayerMap(_means(scores.key, nodes.key), _means(scores.value, nodes.value))


def _best(scores: Tensor, top: int) -> tuple[tuple[int, ...], ...]:
    ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return tuple(tuple(sorted(row)) for row in ranked.tolist())


def _lowest(scores: Tensor) -> tuple[tuple[int, ...], ...]:
    lowest = scores.sort(dim=1, stable=True).indices[:, :1]
    return tuple(tuple(row) for row in lowest.tolist())


def _means(scores: Tensor, nodes: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.stack([row[list(own)].mean() for row, own in zip(scores, nodes, strict=True)])
