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
from rep_fast.models import Answer, Batch, EditableLM, Site

SCORES = ("sum", "abs_sum", "l2", "gxw", "zabs")
KEY_NODES = ("up", "gate", "up+gate")
TARGETS = ("new", "true")


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

    def lists(self) -> list[Tensor]:
        """The 2L independent lists [M] a path picks from: key of layer 0, value of layer 0, key of layer 1, …"""
        return [scores[layer] for layer in range(self.n_layers) for scores in (self.key, self.value)]


@dataclass(frozen=True)
class LayerTrace:
    """Input and upstream gradient of one linear map over T real tokens; G = xᵀg is its weight gradient.

    x: [T, D_in]. g: [T, D_out]. Where asked for: output [T, D_out], x·W without bias; input_gradient [T, D_in] ∂L/∂x.
    """

    x: Tensor
    g: Tensor
    output: Tensor | None = None
    input_gradient: Tensor | None = None


@dataclass(frozen=True)
class Trace:
    """What one backward pass leaves: per layer the traces of its MLP's linear maps, and the NLL of each fact."""

    up: list[LayerTrace]
    gate: list[LayerTrace]
    down: list[LayerTrace]
    nll: tuple[float, ...]


def score_nodes(
    lm: EditableLM,
    facts: Fact | Sequence[Fact],
    *,
    score: str = "zabs",
    k_node: str = "up",
    target: str = "new",
    target_tok: str = "in_context",
    token_budget: int = 4096,
) -> NodeScores:
    """Score every node for one fact, or for the summed loss of several.

    L = Σ_facts mean over target tokens of −log p. Definitions of the scores: `ops.packed_scores`.

    Args:
        score: "zabs" (default), "sum", "abs_sum", "l2" or "gxw".
            Models with LayerNorm (GPT-2, GPT-J) have no signed sums of value-nodes: they vanish, and a warning says so.
        k_node: "up" (default), or for gated MLPs "gate" or "up+gate" (both scores added).
        target: "new" or "true", the target whose NLL is traced.
        token_budget: tokens per forward and backward pass.
    Raises:
        HparamError: unknown option, gate asked of a plain MLP, no facts, or edits are active on the model.
        PromptError: target "true" of a fact that has none.
    Cost: one forward and one backward for activations, plus the scores. `zabs`, `l2` and `abs_sum` of several facts
        keep the traces of all of them, O(T L (D + M)); `sum` and `gxw` add up pass by pass.
    """
    chosen = [facts] if isinstance(facts, Fact) else list(facts)
    _check_options(lm, chosen, score, k_node, target)
    answers = [lm.answer(fact.text, _target_of(fact, target), mode=target_tok) for fact in chosen]
    traces = (
        trace_answers(lm, group, gate="gate" in k_node, products=score == "gxw")
        for group in _within_budget(answers, token_budget)
    )
    if score in ("sum", "gxw"):
        return _summed(traces, score, k_node)
    return _scored(_joined(list(traces)), score, k_node)


def trace_answers(lm: EditableLM, answers: Sequence[Answer], *, gate: bool = False, products: bool = False) -> Trace:
    """One forward and one backward pass; gradients exist for activations at MLP linears only, never for weights.

    Args:
        gate: trace the gate-projection as well.
        products: keep x·W of the up- and gate- and ∂L/∂x of the down-projections too, which `gxw` needs.
    """
    batch = Batch.from_rows([answer.input_ids for answer in answers], device=lm.device)
    kinds = ["mlp_in", "up", *(["gate"] if gate else []), "key", "value"]
    sites = {kind: [Site(kind, layer) for layer in range(lm.n_layers)] for kind in kinds}
    # Without any weight that requires a gradient, the graph starts where the first MLP reads its input.
    start = lm.patch(Site("mlp_in", 0), lambda tensor: tensor.detach().requires_grad_())
    wanted = ["up", *(["gate"] if gate else []), "value", *(["key"] if products else [])]
    with torch.enable_grad(), start, lm.capture([site for own in sites.values() for site in own]) as seen:
        logits = lm.logits(batch, at=[list(answer.positions) for answer in answers])
        losses = _target_nll(logits, answers)
        asked = [seen[site] for kind in wanted for site in sites[kind]]
        # Only the activations are inputs here: autograd never forms the gradient of a weight.
        gradients = iter(torch.autograd.grad(losses.sum(), asked))
    real = batch.is_real
    upstream = {
        kind: [next(gradients)[real.to(s.device)] for s in map(seen.__getitem__, sites[kind])] for kind in wanted
    }
    read = {kind: [seen[site].detach()[real.to(seen[site].device)] for site in sites[kind]] for kind in kinds}
    return Trace(
        up=_key_traces(lm, read, upstream, "up", products),
        gate=_key_traces(lm, read, upstream, "gate", products) if gate else [],
        down=_down_traces(read, upstream, products),
        nll=tuple(losses.tolist()),
    )


def _target_nll(logits: Tensor, answers: Sequence[Answer]) -> Tensor:
    """Mean NLL per target token of each answer, [n]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    targets = torch.tensor([token for answer in answers for token in answer.target_ids], device=wide.device)
    nll = -wide.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return torch.stack([own.mean() for own in nll.split([len(answer.target_ids) for answer in answers])])


Activations = dict[str, list[Tensor]]


def _key_traces(
    lm: EditableLM, read: Activations, upstream: Activations, kind: str, products: bool
) -> list[LayerTrace]:
    outputs: list[Tensor | None] = [None] * lm.n_layers
    if products:
        outputs = [_without_bias(lm, layer, kind, output) for layer, output in enumerate(read[kind])]
    return [LayerTrace(*parts) for parts in zip(read["mlp_in"], upstream[kind], outputs, strict=True)]


def _without_bias(lm: EditableLM, layer: int, kind: str, output: Tensor) -> Tensor:
    path = lm.layout.up if kind == "up" else lm.layout.gate
    bias = getattr(lm.blocks[layer].get_submodule(path), "bias", None)
    return output if bias is None else output - bias.detach()


def _down_traces(read: Activations, upstream: Activations, products: bool) -> list[LayerTrace]:
    return [
        LayerTrace(key, g, input_gradient=upstream["key"][layer] if products else None)
        for layer, (key, g) in enumerate(zip(read["key"], upstream["value"], strict=True))
    ]


def _scored(trace: Trace, score: str, k_node: str) -> NodeScores:
    """Scores of one trace."""
    key = []
    for layer in range(len(trace.down)):
        used = [own[layer] for name, own in (("up", trace.up), ("gate", trace.gate)) if name in k_node.split("+")]
        key.append(torch.stack([_columns(own, score).cpu() for own in used]).sum(0))
    value = [_rows(own, score).cpu() for own in trace.down]
    if score in ("sum", "abs_sum") and all(_cancels(own.g) for own in trace.down):
        warnings.warn(
            f"score {score!r} of value-nodes is rounding noise: behind a LayerNorm the gradient of the residual stream "
            "sums to zero over its dimensions; use 'zabs', 'l2' or 'gxw'",
            stacklevel=3,
        )
    return NodeScores(torch.stack(key), torch.stack(value), score, k_node, trace.nll)


def _cancels(g: Tensor) -> bool:
    """Whether every token's gradient sums to zero over its dimensions, up to rounding."""
    tolerance = min(100 * torch.finfo(g.dtype).eps, 1e-3)
    wide = g.double()
    return bool((wide.sum(1).abs() <= tolerance * wide.abs().sum(1)).all())


def _columns(own: LayerTrace, score: str) -> Tensor:
    return ops.packed_scores(own.x, own.g, score=score, weight_output=own.output, nodes="columns").columns


def _rows(own: LayerTrace, score: str) -> Tensor:
    return ops.packed_scores(own.x, own.g, score=score, input_gradient=own.input_gradient, nodes="rows").rows


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
        nll=tuple(nll for trace in traces for nll in trace.nll),
    )


def _joined_layers(parts: Sequence[Sequence[LayerTrace]]) -> list[LayerTrace]:
    if len(parts) == 1:
        return list(parts[0])
    return [
        LayerTrace(torch.cat([own.x for own in layer]), torch.cat([own.g for own in layer]))
        for layer in zip(*parts, strict=True)
    ]


def _within_budget(answers: Sequence[Answer], token_budget: int) -> Iterator[list[Answer]]:
    """Consecutive answers whose padded batch holds at most `token_budget` tokens (one answer at least)."""
    group: list[Answer] = []
    for answer in answers:
        longest = max(len(a.input_ids) for a in [*group, answer])
        if group and (len(group) + 1) * longest > token_budget:
            yield group
            group = []
        group.append(answer)
    yield group


def _target_of(fact: Fact, target: str) -> str:
    if target == "new":
        return fact.target_new
    if fact.target_true is None:
        raise PromptError(f"fact {fact.text!r} has no target_true to trace; give one or trace target='new'")
    return fact.target_true


def _check_options(lm: EditableLM, facts: Sequence[Fact], score: str, k_node: str, target: str) -> None:
    for name, value, known in (("score", score, SCORES), ("k_node", k_node, KEY_NODES), ("target", target, TARGETS)):
        if value not in known:
            raise HparamError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if not facts:
        raise HparamError("no facts to trace; give at least one")
    if "gate" in k_node and lm.layout.gate is None:
        raise HparamError(f"k_node={k_node!r} needs a gated MLP, {lm.family} has a plain one; use k_node='up'")
    if lm.active_edits:
        raise HparamError(
            f"{len(lm.active_edits)} edits are active on {lm.name!r}; undo them, tracing reads the original"
        )
