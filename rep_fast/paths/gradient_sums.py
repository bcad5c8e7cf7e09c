"""Scores of a gradient summed over more tokens than can be kept, by groups of layers (methods §7.3, end).

`l2`, `zabs` and `abs_sum` are not additive over requests: they need G = Σ xᵀg itself. Keeping every token's x and g
until the end costs O(T L (D + M)); G costs L D M however many facts there are. So G is summed up by products, for as
many layers at a time as fit into a budget, and the passes are repeated for the next group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rep_fast.models import Answer, EditableLM
from rep_fast.paths.tracing import trace_answers, within_budget

_TILE_ROWS = 256


def summed_gradient_scores(
    lm: EditableLM, answers: Sequence[Answer], *, score: str, k_node: str, token_budget: int, memory_budget: int
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Scores of key- and value-nodes [L, M] float64 of the summed gradient, and the NLL of each answer.

    Args:
        score: "l2", "zabs" or "abs_sum".
        memory_budget: bytes that the summed gradients may take; one layer's are always allowed.
    Cost: one forward and one backward pass over all answers per group of layers.
    """
    matrices = k_node.split("+")
    key: list[Tensor] = []
    value: list[Tensor] = []
    for layers in _layer_groups(lm, len(matrices) + 1, memory_budget):
        sums: dict[tuple[int, str], Tensor] = {}
        nll: list[Tensor] = []
        for group in within_budget(answers, token_budget):
            trace = trace_answers(lm, group, gate="gate" in matrices, layers=layers)
            nll.append(trace.nll)
            for place, layer in enumerate(layers):
                for name in matrices:
                    traced = (trace.up if name == "up" else trace.gate)[place]
                    _add_product(sums, (layer, name), traced.x, traced.g)
                # transposed, so that a value-node too is a column of a [D, M] gradient
                _add_product(sums, (layer, "down"), trace.down[place].g, trace.down[place].x)
        for layer in layers:
            own = [gradient_column_scores(sums.pop((layer, name)), score) for name in matrices]
            key.append(torch.stack(own).sum(0))
            value.append(gradient_column_scores(sums.pop((layer, "down")), score))
    return on_host(key), on_host(value), tuple(torch.cat(nll).tolist())


def on_host(layers: Sequence[Tensor]) -> Tensor:
    """[L, *] on the host, of one tensor per layer; one copy, wherever the layers are."""
    return torch.stack([own.to(layers[-1].device) for own in layers]).cpu()


def gradient_column_scores(gradient: Tensor, score: str) -> Tensor:
    """`l2`, `zabs` or `abs_sum` of every column of G [D_in, D_out], [D_out] float64, as `ops.packed_scores` defines."""
    if score == "abs_sum":
        return gradient.sum(0, dtype=torch.float64).abs()
    total = torch.zeros(gradient.shape[1], dtype=torch.float64, device=gradient.device)
    for tile in gradient.split(_TILE_ROWS):
        wide = tile.double()
        if score == "l2":
            total += wide.square().sum(0)
            continue
        centred = wide - wide.mean(1, keepdim=True)
        sigma = centred.square().sum(1, keepdim=True).div(max(wide.shape[1] - 1, 1)).sqrt()
        # what rounding alone leaves of a constant row is no deviation: it contributes 0
        floor = 8 * torch.finfo(gradient.dtype).eps * wide.abs().amax(1, keepdim=True)
        total += torch.where(sigma > floor, centred.abs() / sigma, 0.0).sum(0)
    return total.sqrt() if score == "l2" else total / gradient.shape[0]


def trace_bytes(lm: EditableLM, answers: Sequence[Answer], k_node: str) -> int:
    """What the traces of all answers take together."""
    n_tokens = sum(len(answer.input_ids) for answer in answers)
    per_token = (len(k_node.split("+")) + 1) * (lm.hidden_size + lm.key_width(0))
    return n_tokens * lm.n_layers * per_token * lm.dtype.itemsize


def _layer_groups(lm: EditableLM, n_matrices: int, memory_budget: int) -> Iterator[range]:
    itemsize = 8 if lm.dtype == torch.float64 else 4
    per_layer = n_matrices * lm.hidden_size * lm.key_width(0) * itemsize
    size = max(1, memory_budget // per_layer)
    for begin in range(0, lm.n_layers, size):
        yield range(begin, min(begin + size, lm.n_layers))


def _add_product(sums: dict[tuple[int, str], Tensor], place: tuple[int, str], left: Tensor, right: Tensor) -> None:
    dtype = torch.promote_types(left.dtype, torch.float32)
    left, right = left.to(dtype), right.to(dtype)
    if place not in sums:
        sums[place] = left.new_zeros(left.shape[1], right.shape[1])
    sums[place].addmm_(left.T, right)
