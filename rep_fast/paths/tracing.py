"""What one backward pass leaves at the MLPs' linear maps: inputs x and upstream gradients g, never a weight gradient.

G = xᵀg is the weight gradient of a linear map; every node score follows from x and g (methods §7.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.models import Answer, Batch, EditableLM, Site
from rep_fast.models.transfer import sent


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
    """What one backward pass leaves: per traced layer its MLP's linear maps, and the NLL of each fact [n]."""

    up: list[LayerTrace]
    gate: list[LayerTrace]
    down: list[LayerTrace]
    nll: Tensor


def trace_answers(
    lm: EditableLM,
    answers: Sequence[Answer],
    *,
    gate: bool = False,
    products: bool = False,
    layers: Sequence[int] | None = None,
) -> Trace:
    """One forward and one backward pass; gradients exist for activations at MLP linears only, never for weights.

    Args:
        gate: trace the gate-projection as well.
        products: keep x·W of the up- and gate- and ∂L/∂x of the down-projections too, which `gxw` needs.
        layers: layers to trace, ascending; None for all. The backward pass ends at the lowest.
    """
    layers = range(lm.n_layers) if layers is None else layers
    kinds = ["mlp_in", "up", *(["gate"] if gate else []), "key", "value"]
    sites = {kind: [Site(kind, layer) for layer in layers] for kind in kinds}
    # Without any weight that requires a gradient, the graph starts where the first traced MLP reads its input.
    start = lm.patch(Site("mlp_in", layers[0]), lambda tensor: tensor.detach().requires_grad_())
    wanted = ["up", *(["gate"] if gate else []), "value", *(["key"] if products else [])]
    with torch.enable_grad(), start, lm.capture([site for own in sites.values() for site in own]) as seen:
        losses = target_nll(lm, answers)
        asked = [seen[site] for kind in wanted for site in sites[kind]]
        # Only the activations are inputs here: autograd never forms the gradient of a weight.
        gradients = iter(torch.autograd.grad(losses.sum(), asked))
    real = _RealTokens(answers)
    upstream = {kind: [real.of(next(gradients)) for _ in sites[kind]] for kind in wanted}
    read = {kind: [real.of(seen[site].detach()) for site in sites[kind]] for kind in kinds}
    return Trace(
        up=_key_traces(lm, layers, read, upstream, "up", products),
        gate=_key_traces(lm, layers, read, upstream, "gate", products) if gate else [],
        down=_down_traces(read, upstream, products),
        nll=losses.detach(),
    )


class _RealTokens:
    """Takes the pads out of activations; where they are is known on the host, and sent to each device once."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        lengths = [len(answer.input_ids) for answer in answers]
        width = max(lengths)
        self._places = torch.tensor([row * width + place for row, n in enumerate(lengths) for place in range(n)])
        self._on: dict[torch.device, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """[n, T, *] → [n_tokens, *], row after row."""
        if tensor.device not in self._on:
            self._on[tensor.device] = sent(self._places, tensor.device)
        return tensor.flatten(0, 1)[self._on[tensor.device]]


def target_nll(lm: EditableLM, answers: Sequence[Answer]) -> Tensor:
    """Mean NLL per target token of each answer under teacher forcing, [n]; float32, or float64 from such a model."""
    # where the prompts end is told too: an active codebook or side memory decides by it
    batch = Batch.from_rows(
        [answer.input_ids for answer in answers],
        prompt_lengths=[answer.prompt_length for answer in answers],
        device=lm.device,
    )
    logits = lm.logits(batch, at=[list(answer.positions) for answer in answers])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    targets = sent(torch.tensor([token for answer in answers for token in answer.target_ids]), wide.device)
    nll = -wide.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    return torch.stack([own.mean() for own in nll.split([len(answer.target_ids) for answer in answers])])


def within_budget(answers: Sequence[Answer], token_budget: int) -> Iterator[list[Answer]]:
    """Consecutive answers whose padded batch holds at most `token_budget` tokens (one answer at least)."""
    group: list[Answer] = []
    for answer in answers:
        longest = max(len(a.input_ids) for a in [*group, answer])
        if group and (len(group) + 1) * longest > token_budget:
            yield group
            group = []
        group.append(answer)
    yield group


Activations = dict[str, list[Tensor]]


def _key_traces(
    lm: EditableLM, layers: Sequence[int], read: Activations, upstream: Activations, kind: str, products: bool
) -> list[LayerTrace]:
    outputs: list[Tensor | None] = [None] * len(layers)
    if products:
        outputs = [_without_bias(lm, layer, kind, own) for layer, own in zip(layers, read[kind], strict=True)]
    return [LayerTrace(*parts) for parts in zip(read["mlp_in"], upstream[kind], outputs, strict=True)]


def _without_bias(lm: EditableLM, layer: int, kind: str, output: Tensor) -> Tensor:
    path = lm.layout.up if kind == "up" else lm.layout.gate
    bias = getattr(lm.blocks[layer].get_submodule(path), "bias", None)
    return output if bias is None else output - bias.detach()


def _down_traces(read: Activations, upstream: Activations, products: bool) -> list[LayerTrace]:
    input_gradients = upstream["key"] if products else [None] * len(read["key"])
    return [
        LayerTrace(key, g, None, d) for key, g, d in zip(read["key"], upstream["value"], input_gradients, strict=True)
    ]
