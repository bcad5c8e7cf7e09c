"""The gated key adapter at inference beside the module one would write in torch; no gate opens, as for most tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from rep_fast.bench.cases import GATE_CASES, GateCase
from rep_fast.bench.interleaved import Provider
from rep_fast.ops import AdapterWeights, gated_adapter, native

CASES = GATE_CASES
_TAU = 0.9
_RANK = 32
# Distinct weights of one dtype: beyond the caches, and within a small machine's memory; more adapters repeat them.
_BANK_BYTES = 800_000_000
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """keys [T, M] and a bank of adapters, each in float32 and bfloat16."""

    case: GateCase
    keys: dict[str, Tensor]
    bank: dict[str, list[AdapterWeights]]

    @classmethod
    def draw(cls, case: GateCase, *, seed: int) -> Inputs:
        """Normal numbers, fresh for each seed; the gates' bias of −4 keeps every one shut."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(case.n_tokens, case.key_dim, generator=generator)
        bank: dict[str, list[AdapterWeights]] = {}
        for name, dtype in _DTYPES.items():
            size = case.key_dim * case.gate_hidden * dtype.itemsize
            n_distinct = min(case.n_adapters * case.n_calls, max(_BANK_BYTES // size, 1))
            bank[name] = [_adapter(case, dtype, generator) for _ in range(n_distinct)]
        return cls(case, {name: keys.to(dtype) for name, dtype in _DTYPES.items()}, bank)

    def calls(self, dtype: str) -> Iterator[list[AdapterWeights]]:
        """The adapters of each call."""
        bank, E = self.bank[dtype], self.case.n_adapters
        for call in range(self.case.n_calls):
            yield [bank[(call * E + i) % len(bank)] for i in range(E)]

    def is_exact(self, result: Tensor) -> bool:
        """Whether every key came back as it was, bit for bit."""
        return torch.equal(result, self.keys["fp32" if result.dtype == torch.float32 else "bf16"])


def _adapter(case: GateCase, dtype: torch.dtype, generator: torch.Generator) -> AdapterWeights:
    M, H = case.key_dim, case.gate_hidden

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    return AdapterWeights(
        draw(_RANK, M), draw(M, _RANK), draw(H, M), draw(H), draw(H), torch.full((1,), -4.0).to(dtype)
    )


def providers(inputs: Inputs) -> list[Provider]:
    """Ours at every level of the machine, float32 and bfloat16 weights, then the eager module in both."""
    found = []
    module = native.find().module
    if module is not None:
        levels = native.levels(module)
        for level in levels[1:] or levels:  # the portable body only where there is nothing else
            for dtype in _DTYPES:
                # bfloat16 weights are mostly multiplied in float32, and with bfloat16 products where those are faster
                found.append(Provider(f"rep_fast {level} {dtype} weights", "fp32", _ours(inputs, dtype), True, level))
    found += [Provider(f"torch eager {dtype}", dtype, _eager(inputs, dtype)) for dtype in _DTYPES]
    return found


def _ours(inputs: Inputs, dtype: str) -> Callable[[], Tensor]:
    keys = inputs.keys[dtype]

    def run() -> Tensor:
        with torch.inference_mode():
            for adapters in inputs.calls(dtype):
                result = gated_adapter(keys, adapters, tau=_TAU)
        return result

    return run


def _eager(inputs: Inputs, dtype: str) -> Callable[[], Tensor]:
    """As a module would: the projection of every token, times its decision."""
    keys = inputs.keys[dtype]

    def run() -> Tensor:
        with torch.inference_mode():
            for adapters in inputs.calls(dtype):
                result = keys
                for weights in adapters:
                    hidden = gelu(linear(result, weights.w1, weights.b1))
                    gate = torch.sigmoid(linear(hidden, weights.w2.unsqueeze(0), weights.b2))  # [T, 1]
                    moved = linear(linear(result, weights.a), weights.b)
                    result = result + (gate > _TAU) * moved
        return result

    return run
