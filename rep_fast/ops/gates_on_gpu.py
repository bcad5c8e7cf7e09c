"""The hard gates of `gated_adapter` on a GPU. Nothing here waits for the device or depends on what is open, so that
calls may be recorded in a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rep_fast.ops.gate_gradient import dense_rows
from rep_fast.ops.native import stream_number
from rep_fast.ops.tf32 import is_tf32_allowed

if TYPE_CHECKING:
    from rep_fast.ops.gated_adapter import AdapterWeights

# up to here the kernels multiply themselves and read W1 once per 8 tokens; beyond, the library's products are faster
_FEW_TOKENS = 32
# tokens of one piece: products with W1 that stay in the L2 cache, and scratch of several adapters, which grows with it
_TOKENS_OF_ONE_ADAPTER = 4096
_TOKENS_OF_SEVERAL = 1024


def gates_on_gpu(
    module: ModuleType, keys: Tensor, adapters: Sequence[AdapterWeights], bounds: Sequence[float], compose: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Adapted keys [T, M], logits [E, T] float32 and which gates were open [E, T].

    Args:
        module: `rep_fast._C_cuda`.
        keys: [T, M] float32, bfloat16 or float16.
        adapters: weights of float32 or bfloat16; where both occur, all are widened.
        bounds: of each gate's logit, rounded to float32.
    """
    keys = dense_rows(keys)
    adapted = torch.empty_like(keys, memory_format=torch.contiguous_format)
    gates = _GatesOfCall(module, _of_one_dtype(adapters), list(bounds), compose, keys.device)
    n_rows = _TOKENS_OF_ONE_ADAPTER if len(adapters) == 1 else _TOKENS_OF_SEVERAL
    found = [gates.run(*piece) for piece in zip(keys.split(n_rows), adapted.split(n_rows), strict=True)]
    if len(found) == 1:
        return adapted, *found[0]
    logits, opened = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return adapted, logits, opened


def _of_one_dtype(adapters: Sequence[AdapterWeights]) -> list[Tensor]:
    """a, b, w1, b1, w2, b2 of every adapter, as the kernels read them."""
    is_mixed = len({adapter.a.dtype for adapter in adapters}) > 1
    weights = [part.float() if is_mixed else part for adapter in adapters for part in adapter]
    return [dense_rows(part) if part.dim() == 2 else part.contiguous() for part in weights]


class _GatesOfCall:
    """What the pieces of one call share."""

    def __init__(
        self, module: ModuleType, weights: list[Tensor], bounds: list[float], compose: str, device: torch.device
    ) -> None:
        self._module, self._bounds = module, bounds
        self._options: dict[str, Any] = {"weights": weights, "thresholds": bounds, "compose": compose}
        self._weights = [weights[i : i + 6] for i in range(0, len(weights), 6)]
        # a counter per adapter and some for all; every call leaves them zero
        n_tickets = len(bounds) + module.more_gate_tickets
        self._tickets = torch.zeros(n_tickets, dtype=torch.int32, device=device)
        self._stream = stream_number(device)

    def run(self, keys: Tensor, adapted: Tensor) -> tuple[Tensor, Tensor]:
        """Fills `adapted`; logits and open gates of these tokens."""
        E, T = len(self._bounds), keys.shape[0]
        logits = torch.empty(E, T, device=keys.device)
        opened = torch.empty(E, T, dtype=torch.bool, device=keys.device)
        is_many = T > _FEW_TOKENS
        if is_many:
            adapted.copy_(keys)
            self._decide_by_products(keys, logits, opened)
        n_bytes = self._module.gated_adapter_scratch(keys=keys, **self._options)
        self._module.gated_adapter(
            keys=keys,
            decides=not is_many,
            adapted=adapted,
            logits=logits,
            opened=opened,
            tickets=self._tickets,
            scratch=torch.empty(-(-n_bytes // 8), dtype=torch.int64, device=keys.device),
            stream=self._stream,
            **self._options,
        )
        return logits, opened

    def _decide_by_products(self, keys: Tensor, logits: Tensor, opened: Tensor) -> None:
        for number, weights in enumerate(self._weights):
            self._module.gate_products(
                products=_products(keys, weights[2]),
                weights=weights,
                threshold=self._bounds[number],
                logits=logits[number],
                opened=opened[number],
                stream=self._stream,
            )


def _products(keys: Tensor, w1: Tensor) -> Tensor:
    """W1 k of every token, [T, H] float32."""
    if keys.is_cuda and keys.dtype == w1.dtype == torch.bfloat16:
        return torch.mm(keys, w1.T, out_dtype=torch.float32)
    if is_tf32_allowed(keys.device):
        return (keys.double() @ w1.double().T).float()
    return keys.float() @ w1.float().T
