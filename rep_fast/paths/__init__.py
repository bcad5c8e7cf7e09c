"""Parameter paths a fact runs through: node scores without weight gradients, and the selection of nodes."""

from __future__ import annotations

from rep_fast.paths.node_scores import LayerTrace, NodeScores, Trace, score_nodes, trace_answers
from rep_fast.paths.selection import LayerMap, NodeSet, Path, PathSelection, layer_map, select

__all__ = [
    "LayerMap",
    "LayerTrace",
    "NodeScores",
    "NodeSet",
    "Path",
    "PathSelection",
    "Trace",
    "layer_map",
    "score_nodes",
    "select",
    "trace_answers",
]
