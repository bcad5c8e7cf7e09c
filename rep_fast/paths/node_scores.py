"""How much each key- and value-node of every MLP matters for a fact, without forming a weight gradient.

A key-node is column j of the up-projection (D×M, acting on rows), a value-node row j of the down-projection (M×D). The
loss is the NLL of the target, teacher-forced on the unedited model; its weight gradients are G = xᵀg per linear map,
and every score of a node follows from x and g (path-editing method, methods §7.1–7.3).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast import ops
from rep_fast.errors import HparamError, PromptError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.ops.finite import is_finite
from rep_fast.paths.gradient_sums import on_host, summed_gradient_scores, trace_bytes
from rep_fast.paths.tracing import LayerTrace, Trace, trace_answers, within_budget

SCORES = ("sum", "abs_sum", "l2", "gxw", "zabs")
KEY_NODES = ("up", "gate", "up+gate")
TARGETS = ("new", "true")
MEMORY_BUDGET = 1 << 30


@dataclass(frozen=True)
class NodeScores:
    """One score per node; a path's score is the sum over its nodes.

    Attributes:
        key: [L, M] float64, key-nodes (columns of the up- or gate-projection, or the sum of both scores).
        value: [L, M] float64, value-nodes (rows of the down-projection).
        score: name of the score, one of `SCORES`.
        k_node: which columns `key` stands for, one of `KEY_NODES`.
        nll: mean NLL per target token, one per fact.
    """

    key: Tensor
    value: Tensor
    score: str
    k_node: str
    nll: tuple[float, ...]

    @property
    def n_layers(self) -> int:
        return self.key.shape[0]

    def at(self, layers: Sequence[int]) -> NodeScores:
        """The scores of these layers alone, in this order."""
        rows = list(layers)
        return NodeScores(self.key[rows], self.value[rows], self.score, self.k_node, self.nll)

    def lists(self) -> list[Tensor]:
        """The 2L independent lists [M] a path picks from: key of layer 0, value of layer 0, key of layer 1, …"""
        return [scores[layer] for layer in range(self.n_layers) for scores in (self.key, self.value)]


def score_nodes(
    lm: EditableLM,
    facts: Fact | Sequence[Fact],
    *,
    score: str = "zabs",
    k_node: str = "up",
    target: str = "new",
    target_tok: str = "in_context",
    token_budget: int = 4096,
    memory_budget: int = MEMORY_BUDGET,
    with_edits: bool = False,
) -> NodeScores:
    """Score every node for one fact, or for the summed loss of several.

    L = Σ_facts mean over target tokens of −log p. Definitions of the scores: `ops.packed_scores`.

    Args:
        score: "zabs" (default), "sum", "abs_sum", "l2" or "gxw".
            Models with LayerNorm (GPT-2, GPT-J) have no signed sums of value-nodes: they vanish, and a warning says so.
        k_node: "up" (default), or for gated MLPs "gate" or "up+gate" (both scores added).
        target: "new" or "true", the target whose NLL is traced.
        token_budget: tokens per forward and backward pass.
        memory_budget: bytes for what `zabs`, `l2` and `abs_sum` of several facts keep: their traces, O(T L (D + M)), or
            where these take more the summed gradients of a group of layers at a time.
        with_edits: trace the model as it stands, with the edits that are active on it.
    Raises:
        HparamError: unknown option, gate asked of a plain MLP, no facts, or edits are active on the model.
        PromptError: target "true" of a fact that has none.
    Cost: one forward and one backward for activations, plus the scores; several facts beyond `memory_budget` take that
        once per group of layers. `sum` and `gxw` add up pass by pass.
    """
    chosen = [facts] if isinstance(facts, Fact) else list(facts)
    _check_options(lm, chosen, score, k_node, target, with_edits)
    answers = [lm.answer(fact.text, _target_of(fact, target), mode=target_tok) for fact in chosen]
    is_linear = score in ("sum", "gxw")
    if not is_linear and len(answers) > 1 and trace_bytes(lm, answers, k_node) > memory_budget:
        key, value, nll = summed_gradient_scores(
            lm, answers, score=score, k_node=k_node, token_budget=token_budget, memory_budget=memory_budget
        )
        return NodeScores(key, value, score, k_node, nll)
    traces = (
        trace_answers(lm, group, gate="gate" in k_node, products=score == "gxw")
        for group in within_budget(answers, token_budget)
    )
    if is_linear:
        return _summed(traces, score, k_node)
    return _scored(_joined(list(traces)), score, k_node)


def _scored(trace: Trace, score: str, k_node: str) -> NodeScores:
    """Scores of one trace."""
    # where a look at x and g would wait for a device, the scores tell: a NaN or infinity makes them so
    checks = trace.nll.device.type == "cpu"
    key, value = _on_host(trace, score, k_node, checks=checks)
    if not checks and not (is_finite(key) and is_finite(value)):
        key, value = _on_host(trace, score, k_node, checks=True)
    if score in ("sum", "abs_sum") and _all_cancel([own.g for own in trace.down]):
        warnings.warn(
            f"score {score!r} of value-nodes is rounding noise: behind a LayerNorm the gradient of the residual stream "
            "sums to zero over its dimensions; use 'zabs', 'l2' or 'gxw'",
            stacklevel=3,
        )
    return NodeScores(key, value, score, k_node, tuple(trace.nll.tolist()))


def _on_host(trace: Trace, score: str, k_node: str, *, checks: bool) -> tuple[Tensor, Tensor]:
    """Scores [L, M] of key- and value-nodes."""
    key = []
    for layer in range(len(trace.down)):
        used = [own[layer] for name, own in (("up", trace.up), ("gate", trace.gate)) if name in k_node.split("+")]
        key.append(torch.stack([_columns(own, score, checks) for own in used]).sum(0))
    return on_host(key), on_host([_rows(own, score, checks) for own in trace.down])


def _all_cancel(gradients: Sequence[Tensor]) -> bool:
    """Whether in every layer every token's gradient sums to zero over its dimensions, up to rounding."""
    found = []
    for g in gradients:
        tolerance = min(100 * torch.finfo(g.dtype).eps, 1e-3)
        wide = g.double()
        found.append((wide.sum(1).abs() <= tolerance * wide.abs().sum(1)).all().to(gradients[-1].device))
    return bool(torch.stack(found).all())


def _columns(own: LayerTrace, score: str, checks: bool) -> Tensor:
    return ops.packed_scores(
        own.x, own.g, score=score, weight_output=own.output, nodes="columns", check_finite=checks
    ).columns


def _rows(own: LayerTrace, score: str, checks: bool) -> Tensor:
    return ops.packed_scores(
        own.x, own.g, score=score, input_gradient=own.input_gradient, nodes="rows", check_finite=checks
    ).rows


def _summed(traces: Iterator[Trace], score: str, k_node: str) -> NodeScores:
    """Scores that are linear in G, added up pass by pass."""
    parts = [_scored(trace, score, k_node) for trace in traces]
    return NodeScores(
        key=torch.stack([part.key for part in parts]).sum(0),
        value=torch.stack([part.value for part in parts]).sum(0),
        score=score,
        k_node=k_node,
        nll=tuple(nll for part in parts for nll in part.nll),
    )


def _joined(traces: Sequence[Trace]) -> Trace:
    """All tokens in one trace: Σ xᵀg over the parts is the product of the concatenated x and g."""
    return Trace(
        up=_joined_layers([trace.up for trace in traces]),
        gate=_joined_layers([trace.gate for trace in traces]),
        down=_joined_layers([trace.down for trace in traces]),
        nll=torch.cat([trace.nll for trace in traces]),
    )


def _joined_layers(parts: Sequence[Sequence[LayerTrace]]) -> list[LayerTrace]:
    if len(parts) == 1:
        return list(parts[0])
    return [
        LayerTrace(torch.cat([own.x for own in layer]), torch.cat([own.g for own in layer]))
        for layer in zip(*parts, strict=True)
    ]


def _target_of(fact: Fact, target: str) -> str:
    if target == "new":
        return fact.target_new
    if fact.target_true is None:
        raise PromptError(f"fact {fact.text!r} has no target_true to trace; give one or trace target='new'")
    return fact.target_true


def _check_options(
    lm: EditableLM, facts: Sequence[Fact], score: str, k_node: str, target: str, with_edits: bool
) -> None:
    for name, value, known in (("score", score, SCORES), ("k_node", k_node, KEY_NODES), ("target", target, TARGETS)):
        if value not in known:
            raise HparamError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if not facts:
        raise HparamError("no facts to trace; give at least one")
    if "gate" in k_node and lm.layout.gate is None:
        raise HparamError(f"k_node={k_node!r} needs a gated MLP, {lm.family} has a plain one; use k_node='up'")
    if lm.active_edits and not with_edits:
        raise HparamError(
            f"{len(lm.active_edits)} edits are active on {lm.name!r}; undo them, or trace with_edits=True"
        )
