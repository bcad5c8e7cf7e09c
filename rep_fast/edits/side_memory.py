"""WISE's side memory: a second weight W' beside W, and a rule which of the two a prompt goes through (methods §5.14).

The rule looks at the activation gap of a token, d = ‖act(Wk + b) − act(W'k + b)‖₂, which training made large on edited
prompts and small elsewhere: a prompt whose mean gap reaches a share of the smallest one seen in training goes through
W', with everything that follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from rep_fast.edits.replacement import UNTOUCHED
from rep_fast.errors import HparamError, LayerError, NonFiniteError
from rep_fast.models import ForwardPass

# of longer prompts the largest gap counts instead of the mean
LONG_PROMPT = 100


@dataclass(frozen=True)
class MemoryRules:
    """How memories are filled, merged and chosen; the same for all at one module.

    activation: name of the model's activation. act_ratio: share of the smallest training gap that opens a memory.
    save_freq: facts per memory. merge_freq: facts after which their memories are merged into one. density: share of
    entries, the largest, that each memory keeps when merged.
    """

    activation: str
    act_ratio: float = 0.88
    save_freq: int = 500
    merge_freq: int = 1000
    density: float = 0.53

    def __post_init__(self) -> None:
        if self.activation not in ACT2FN:
            raise HparamError(f"activation {self.activation!r} is unknown; use a name that transformers knows")
        if self.save_freq < 1 or self.merge_freq % self.save_freq:
            raise HparamError(
                f"merge_freq={self.merge_freq} must be a multiple of save_freq={self.save_freq}, both at least 1"
            )
        if not 0 < self.density <= 1 or self.act_ratio <= 0:
            raise HparamError(
                f"density={self.density} must lie in 0 to 1, 0 excluded, and act_ratio={self.act_ratio} above 0"
            )


@dataclass(frozen=True, eq=False)
class SideMemory:
    """Changes W' − W in the order they were written; which memories act follows from that order.

    A change is written on top of the memory that is being filled. Each memory takes `save_freq` facts, then the next
    one begins at W; the memories of each `merge_freq` facts become one by TIES.

    Args:
        changes: [m, outputs, inputs] floating point; what each piece adds to the memory it belongs to.
        gaps: smallest mean activation gap of the facts of each piece, positive.
        counts: facts of each piece.
        rules: see `MemoryRules`.
    Raises:
        LayerError: the parts do not fit each other. HparamError: a gap or count out of range.
        NonFiniteError: a change holds NaN or infinity.
    """

    kind: ClassVar[str] = "side_memory"

    changes: Tensor
    gaps: tuple[float, ...]
    counts: tuple[int, ...]
    rules: MemoryRules

    def __post_init__(self) -> None:
        object.__setattr__(self, "gaps", tuple(map(float, self.gaps)))
        object.__setattr__(self, "counts", tuple(map(int, self.counts)))
        counts = {len(self.changes), len(self.gaps), len(self.counts)}
        if self.changes.ndim != 3 or not self.changes.is_floating_point() or len(counts) != 1 or counts == {0}:
            raise LayerError(
                f"changes {tuple(self.changes.shape)} {self.changes.dtype} with {len(self.gaps)} gaps and "
                f"{len(self.counts)} counts make no side memory; need floating [m, outputs, inputs], m and m"
            )
        if not all(0 < gap < float("inf") for gap in self.gaps) or min(self.counts) < 1:
            raise HparamError(f"gaps {list(self.gaps)} and counts {list(self.counts)} must be positive and finite")
        if not bool(torch.isfinite(self.changes).all()):
            raise NonFiniteError("a change of the side memory holds NaN or infinity; the edit cannot be used")

    @classmethod
    def stacked(cls, made: Sequence[SideMemory]) -> SideMemory:
        """The memories that several edits have filled, one piece each."""
        return joined(filled(made))

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.changes.shape[1], self.changes.shape[2]

    @cached_property
    def acting(self) -> tuple[SideMemory, ...]:
        """What prompts are routed to, one piece each: merged memories, full ones, and the one that is being filled."""
        memories, rules = filled([self]), self.rules
        share = rules.merge_freq // rules.save_freq
        is_open = memories[-1].counts[0] < rules.save_freq
        n_merged = (len(memories) - is_open) // share * share
        merged = (_merged(memories[begin : begin + share]) for begin in range(0, n_merged, share))
        return (*merged, *memories[n_merged:])

    def decide(self, inputs: Tensor, output: Tensor, told: ForwardPass) -> Tensor:
        """The memory with the largest gap among those whose threshold each row's prompt reaches."""
        rows = []
        for memory in self.acting:
            gaps = prompt_gaps(output, memory.side_output(inputs, output), told, self.rules.activation)
            rows.append(gaps.masked_fill(gaps < self.rules.act_ratio * memory.gaps[0], -torch.inf))
        found = torch.stack(rows).max(dim=0)
        return torch.where(found.values > -torch.inf, found.indices, UNTOUCHED)

    def replaced(self, inputs: Tensor, output: Tensor, decided: Tensor, told: ForwardPass) -> Tensor:
        """Rows that go through a memory get W'k + b at every token."""
        for number, memory in enumerate(self.acting):
            rows = decided == number
            if bool(rows.any()):
                output = torch.where(rows[:, None, None], memory.side_output(inputs, output), output)
        return output

    def side_output(self, inputs: Tensor, output: Tensor) -> Tensor:
        """W'k + b of a single piece, from what W made of the same inputs."""
        return output + (inputs.to(self.changes) @ self.changes[0].T).to(output)

    def parts(self) -> dict[str, Tensor]:
        """Tensors by name, for a file."""
        return {"changes": self.changes}

    def settings(self) -> dict[str, Any]:
        """JSON values beside the tensors."""
        return {"gaps": list(self.gaps), "counts": list(self.counts), "rules": vars(self.rules)}

    @classmethod
    def from_parts(cls, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> SideMemory:
        """Inverse of `parts` and `settings`."""
        rules = MemoryRules(**settings["rules"])
        return cls(parts["changes"], tuple(settings["gaps"]), tuple(settings["counts"]), rules)

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SideMemory:
        """The same memories on another device or in another dtype."""
        return replace(self, changes=self.changes.to(device=device, dtype=dtype))


def activation_gaps(output: Tensor, side: Tensor, activation: str) -> Tensor:
    """d of each token: outputs [..., D] of W and W' → [...]."""
    act = ACT2FN[activation]
    return torch.linalg.vector_norm(act(output) - act(side), dim=-1)


def prompt_gaps(output: Tensor, side: Tensor, told: ForwardPass, activation: str) -> Tensor:
    """[n]: mean gap over each row's prompt, of a long prompt the largest."""
    is_prompt = told.is_prompt(output.shape[1]).to(output.device)
    gaps, lengths = activation_gaps(output, side, activation) * is_prompt, is_prompt.sum(dim=1)
    return torch.where(lengths > LONG_PROMPT, gaps.amax(dim=1), gaps.sum(dim=1) / lengths)


def check_rules(made: Sequence[SideMemory], rules: MemoryRules | None) -> None:
    """Refuse memories that follow other rules than these.

    Raises:
        HparamError: as said.
    """
    if any(memory.rules != rules for memory in made):
        raise HparamError(
            "side memories at one module follow one rule; make the edits with the same act_ratio, save_freq, "
            "merge_freq and density, or undo the other ones first"
        )


def filled(made: Sequence[SideMemory]) -> list[SideMemory]:
    """The memories that pieces fill, in order and each as one piece; the last one may have room left.

    Raises:
        HparamError: the pieces do not follow one rule.
    """
    check_rules(made, made[0].rules if made else None)
    memories: list[SideMemory] = []
    for memory in made:
        for change, gap, count in zip(memory.changes, memory.gaps, memory.counts, strict=True):
            last = memories[-1] if memories else None
            if last is None or last.counts[0] + count > memory.rules.save_freq:
                memories.append(SideMemory(change[None], (gap,), (count,), memory.rules))
            else:
                gaps, counts = (min(last.gaps[0], gap),), (last.counts[0] + count,)
                memories[-1] = SideMemory(last.changes + change, gaps, counts, memory.rules)
    return memories


def joined(memories: Sequence[SideMemory]) -> SideMemory:
    """Several as one, piece by piece."""
    return SideMemory(
        torch.cat([memory.changes for memory in memories]),
        tuple(gap for memory in memories for gap in memory.gaps),
        tuple(count for memory in memories for count in memory.counts),
        memories[0].rules,
    )


def ties_merge(changes: Tensor, density: float) -> Tensor:
    """TIES: of each change [m, …] the `density` share of largest entries; where they disagree in sign the heavier side.

    Returns:
        The mean of the agreeing entries, 0 where nothing was kept.
    """
    kept = max(1, round(density * changes[0].numel()))
    sizes = changes.flatten(1).abs()
    smallest = sizes.kthvalue(sizes.shape[1] - kept + 1, dim=1).values
    trimmed = torch.where(sizes >= smallest[:, None], changes.flatten(1), 0)
    agrees = (trimmed.sign() == trimmed.sum(dim=0).sign()) & (trimmed != 0)
    merged = (trimmed * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)
    return merged.reshape(changes[0].shape)


def _merged(group: Sequence[SideMemory]) -> SideMemory:
    change = ties_merge(torch.cat([memory.changes for memory in group]), group[0].rules.density)
    gap, count = min(memory.gaps[0] for memory in group), sum(memory.counts[0] for memory in group)
    return SideMemory(change[None], (gap,), (count,), group[0].rules)
