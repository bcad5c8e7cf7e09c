"""What the tests of the collision scan share: bodies, inputs, the float64 definition."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rep_fast import backend, ops
from rep_fast.ops import LastTokenExclusion, PairExclusion, TopK, native
from rep_fast.ops.unread_topk import UnreadTopK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what "auto" stands for with bfloat16 keys: the choice by speed would leave passes out on some machines; and the device
# that tensors are moved to
FORCED = {"bfloat16": "auto", "device": "cpu"}


def whitened_topk(keys: Tensor, queries: Tensor, k: int, *, precision: str = "auto", **options: Any) -> TopK:
    """The op on the device of the body under test; its result is on the CPU, read at once."""
    if precision == "auto" and keys.dtype == torch.bfloat16:
        precision = FORCED["bfloat16"]
    if FORCED["device"] != "cpu":
        keys, queries = _moved(keys), _moved(queries)
        options = {name: _moved(option) for name, option in options.items()}
    found = ops.whitened_topk(keys, queries, k, precision=precision, **options)
    if not isinstance(found, UnreadTopK):
        return found
    return TopK.from_tensors({name: tensor.cpu() for name, tensor in found.to_tensors().items()})


def _moved(value: Any) -> Any:
    """On the device, tensors with their strides."""
    if isinstance(value, Tensor):
        n_stored = value.untyped_storage().nbytes() // value.element_size()
        stored = value.as_strided((n_stored,), (1,), 0).to(FORCED["device"])
        return stored.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, LastTokenExclusion | PairExclusion):
        return type(value)(**{field.name: _moved(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, TopK):
        return TopK.from_tensors({name: t if "counts" in name else _moved(t) for name, t in value.to_tensors().items()})
    return value


def bodies() -> list[str]:
    """Every level, every pass where the machine has several, those of the GPU's body, and plain torch."""
    return [*_cpu_bodies(), "cuda", "cuda int8", "cuda-on-cpu", "cuda-on-cpu int8"]


def _cpu_bodies() -> list[str]:
    module = native.find().module
    if module is None:
        return ["reference"]
    levels = [module.level_name(row) for row in range(module.machine_level() + 1)]
    passes = [f"avx512_bf16 {name}" for name in ("bf16", "bf16x2", "int8") if "avx512_bf16" in levels]
    return [*levels, *passes, "reference"]


def random_block(
    n: int, m: int, width: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, width, generator=generator).to(dtype)
    return keys, torch.randn(m, width, generator=generator)


def exact_products(keys: Tensor, queries: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, float]:
    """Float64 scores [m, n], −∞ where excluded, and a bound on the difference of two float64 summation orders."""
    scores = queries.double() @ keys.double().T
    norms = keys.double().norm(dim=1).amax() * queries.double().norm(dim=1).amax() if scores.numel() else 0.0
    bound = 2 * keys.shape[1] * 2.0**-53 * float(norms)
    return (scores if excluded is None else scores.masked_fill(excluded.T, -torch.inf)), bound


def assert_is_top(result: TopK, scores: Tensor, bound: float, *, first_id: int = 0) -> None:
    """`result` is the top k of `scores`; ids are compared where the gap to both neighbours exceeds the bound."""
    k = min(result.k, scores.shape[1])
    want, order = scores.sort(dim=1, descending=True, stable=True)
    there = torch.isfinite(want[:, :k])
    assert torch.equal(result.ids[:, :k] >= 0, there)
    assert (result.ids[:, k:] == -1).all()
    assert (result.exact_scores[:, k:] == -math.inf).all()
    error = (result.exact_scores[:, :k] - want[:, :k])[there].abs()
    assert error.numel() == 0 or float(error.max()) <= bound
    gaps = want[:, :-1] - want[:, 1:]
    infinite = torch.full((scores.shape[0], 1), math.inf, dtype=torch.float64)
    clear = (torch.cat([infinite, gaps], 1) > 2 * bound) & (torch.cat([gaps, infinite], 1) > 2 * bound)
    compared = clear[:, :k] & there
    assert torch.equal(result.ids[:, :k][compared], order[:, :k][compared] + first_id)
    assert (result.exact_scores[:, :-1] >= result.exact_scores[:, 1:]).all()


def same_bits(a: TopK, b: TopK) -> bool:
    return (
        torch.equal(a.exact_scores, b.exact_scores)
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.dropped_queries, b.dropped_queries)
        and (a.n_keys_seen, a.n_nonfinite) == (b.n_keys_seen, b.n_nonfinite)
    )


def brute_force(rule: LastTokenExclusion, n: int) -> Tensor:
    """[n, m] the rule word by word, from the sequences written out."""
    lookback = [] if rule.lookback is None else rule.lookback.tolist()
    starts, tokens, last_tokens = rule.sequence_starts.tolist(), rule.token_ids.tolist(), rule.last_tokens.tolist()
    mask = torch.zeros(n, len(last_tokens), dtype=torch.bool)
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else n
        before = lookback if number == 0 else []
        sequence = before + tokens[start:end]
        for row in range(start, end):
            place = row - start + len(before)
            seen = sequence[max(0, place - rule.window) : place + 1]
            mask[row] = torch.tensor([token in seen for token in last_tokens], dtype=torch.bool)
    return mask


def has_dot_products() -> bool:
    """Whether the level in use multiplies bfloat16 and int8 on the CPU."""
    return backend()["whitened_topk"][0] == "native-avx512_bf16"
