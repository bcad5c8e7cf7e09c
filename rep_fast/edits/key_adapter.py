"""REP's gated projection: moves keys of a subject's other forms to where an edit was written, and nothing else.

k̂ = k + 1[g(k) > τ] π(k), π(k) = B A k, g(k) = sigmoid(w₂ᵀ GELU(W₁k + b₁) + b₂)  (methods §6.1; hard gate at inference).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rep_fast.errors import HparamError, LayerError, NonFiniteError
from rep_fast.ops.gated_adapter import AdapterWeights, gate_logits, gated_adapter

PARTS = ("a", "b", "w1", "b1", "w2", "b2")


@dataclass(frozen=True, eq=False)
class KeyAdapter:
    """The adapter of one down-projection.

    Args:
        weights: A [r, M], B [M, r] with the scale s/r folded in, gate W₁ [H, M], b₁ [H], w₂ [H], b₂ [1]; any float.
        tau: the gate opens for g > tau, strictly; 0 opens always, 1 never.
        trained_for: subjects it was trained for.
        notes: what its training reported; JSON values only.
    Raises:
        HparamError: tau out of range.
        LayerError: the weights do not fit together, or r, M or H is 0.
        NonFiniteError: a weight is NaN or infinite.
    """

    weights: AdapterWeights
    tau: float = 0.9
    trained_for: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau <= 1.0:
            raise HparamError(f"gate threshold tau={self.tau} is out of range; use a number between 0 and 1")
        for name in ("a", "w1"):
            shape = tuple(getattr(self.weights, name).shape)
            if len(shape) != 2 or 0 in shape:
                raise LayerError(f"adapter weight {name} has shape {shape}; it must be a matrix with no empty side")
        rank, width, hidden = self.rank, self.width, self.weights.w1.shape[0]
        wanted: dict[str, tuple[int, ...]] = {"a": (rank, width), "b": (width, rank), "w1": (hidden, width)}
        wanted |= {"b1": (hidden,), "w2": (hidden,), "b2": (1,)}
        for name in PARTS:
            part: Tensor = getattr(self.weights, name)
            if tuple(part.shape) != wanted[name]:
                raise LayerError(f"adapter weight {name} has shape {tuple(part.shape)}, expected {wanted[name]}")
            if not bool(torch.isfinite(part).all()):
                raise NonFiniteError(f"adapter weight {name} holds NaN or infinity; the adapter cannot be used")
        object.__setattr__(self, "trained_for", tuple(self.trained_for))

    @classmethod
    def initial(
        cls,
        width: int,
        *,
        rank: int = 32,
        gate_hidden: int | None = None,
        tau: float = 0.9,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        trained_for: Sequence[str] = (),
    ) -> KeyAdapter:
        """An untrained adapter, which changes no key because B = 0.

        A ~ U(±1/√M); gate layers ~ U(±1/√fan_in) as torch's Linear; the gate is int(0.1·M) wide unless told otherwise.

        Args:
            width: M.
            seed: same seed → same weights on every machine (drawn on the CPU in float64, then cast).
        """
        hidden = max(1, int(0.1 * width)) if gate_hidden is None else gate_hidden
        if width < 1 or rank < 1 or hidden < 1:
            raise HparamError(f"adapter sizes width={width}, rank={rank}, gate_hidden={hidden} must be positive")
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, fan_in: int) -> Tensor:
            draw = torch.rand(*shape, generator=generator, dtype=torch.float64)
            return ((2 * draw - 1) / math.sqrt(fan_in)).to(dtype)

        weights = AdapterWeights(
            a=uniform(rank, width, fan_in=width),
            b=torch.zeros(width, rank, dtype=dtype),
            w1=uniform(hidden, width, fan_in=width),
            b1=uniform(hidden, fan_in=width),
            w2=uniform(hidden, fan_in=hidden),
            b2=uniform(1, fan_in=hidden),
        )
        return cls(weights, tau=tau, trained_for=tuple(trained_for))

    @property
    def width(self) -> int:
        """M."""
        return self.weights.a.shape[1]

    @property
    def rank(self) -> int:
        """r, the width between A and B."""
        return self.weights.a.shape[0]

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KeyAdapter:
        """The same adapter on another device or in another dtype."""
        if not any(part.requires_grad or part.to(device=device, dtype=dtype) is not part for part in self.weights):
            return self
        parts = {name: getattr(self.weights, name).detach().to(device=device, dtype=dtype) for name in PARTS}
        return KeyAdapter(AdapterWeights(**parts), self.tau, self.trained_for, self.notes)

    def __call__(self, keys: Tensor) -> Tensor:
        """k̂ for keys [..., M], any float dtype; rows with a closed gate come back bit for bit."""
        return adapted(keys, [self])

    def gate(self, keys: Tensor) -> Tensor:
        """g(k) in (0, 1) for keys [..., M] → [...]."""
        return torch.sigmoid(gate_logits(keys.reshape(-1, self.width), self.weights)).reshape(keys.shape[:-1])

    def is_open(self, keys: Tensor) -> Tensor:
        """Whether the gate opens: [..., M] → [...] bool."""
        if self.tau in (0.0, 1.0):
            return torch.full(keys.shape[:-1], self.tau == 0.0, dtype=torch.bool, device=keys.device)
        # on logits, as the adapter itself decides, so that both agree in the last bit
        logits = gate_logits(keys.detach().reshape(-1, self.width), self.weights).detach()
        return (logits > logits.new_full((), math.log(self.tau / (1 - self.tau)))).reshape(keys.shape[:-1])


def adapted(keys: Tensor, adapters: Sequence[KeyAdapter], *, compose: str = "chain") -> Tensor:
    """Keys [..., M] after several adapters; in a chain the second sees what the first made of the key (§6.5)."""
    rows = keys.reshape(-1, keys.shape[-1])
    result = gated_adapter(
        rows, [adapter.weights for adapter in adapters], tau=[adapter.tau for adapter in adapters], compose=compose
    )
    return result.reshape(keys.shape)
