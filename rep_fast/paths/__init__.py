"""Parameter paths a fact runs through: node scores without weight gradients, and the selection of nodes."""

from __future__ import annotations

from rep_fast.paths.node_scores import KEY_NODES, SCORES, NodeScores, score_nodes
from rep_fast.paths.selection import MODES, LayerMap, NodeSet, Path, PathSelection, layer_map, select
from rep_fast.paths.tracing import LayerTrace, Trace, target_nll, trace_answers

__all__ = [
    "KEY_NODES",
    "MODES",
    "SCORES",
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
    "target_nll",
    "trace_answers",
]
