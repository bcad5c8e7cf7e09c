"""WISE's side memories: filling, merging and choosing against loops over tokens and entries."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rep_fast.edits import Edit, MemoryRules, ModuleEdit, SideMemory
from rep_fast.edits.replacement import UNTOUCHED
from rep_fast.edits.side_memory import LONG_PROMPT, filled, joined, ties_merge
from rep_fast.errors import HparamError, LayerError, NonFiniteError
from rep_fast.facts import Fact
from rep_fast.models import Batch, ForwardPass

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
RULES = MemoryRules("silu", act_ratio=0.8, save_freq=2, merge_freq=4, density=0.5)
OUTPUTS, INPUTS = 3, 5


def random_change(seed: int) -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def piece(seed: int, gap: float = 1.0, count: int = 1, rules: MemoryRules = RULES) -> SideMemory:
    return SideMemory(random_change(seed)[None], (gap,), (count,), rules)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_pieces_fill_memories_in_order() -> None:
    first, second, third = filled([piece(0, 3.0), piece(1, 2.0), piece(2, 5.0), piece(3, 1.0, count=2)])
    close(first.changes[0], random_change(0) + random_change(1))
    assert (first.gaps, first.counts) == ((2.0,), (2,))
    # two more facts do not fit beside one: the next memory begins
    close(second.changes[0], random_change(2))
    close(third.changes[0], random_change(3))
    assert (second.counts, third.counts) == ((1,), (2,))


def test_full_memories_are_merged_and_the_open_one_stays() -> None:
    made = [piece(seed, gap=1.0 + seed) for seed in range(7)]
    acting = SideMemory.stacked(made).acting
    assert [(memory.counts, memory.gaps) for memory in acting] == [((4,), (1.0,)), ((2,), (5.0,)), ((1,), (7.0,))]
    sums = [random_change(2 * block) + random_change(2 * block + 1) for block in range(3)]
    close(acting[0].changes[0], ties_merge(torch.stack(sums[:2]), 0.5))
    close(acting[1].changes[0], sums[2])
    close(acting[2].changes[0], random_change(6))
    # an edit that wrote several pieces is the same as several edits, and so is a stack on a stack
    for same in (joined(made), SideMemory.stacked([SideMemory.stacked(made[:5]), *made[5:]])):
        assert len(same.acting) == 3
        for one, other in zip(same.acting, acting, strict=True):
            close(one.changes, other.changes)


def plain_ties(changes: Tensor, density: float) -> Tensor:
    """TIES entry by entry."""
    kept = max(1, round(density * changes[0].numel()))
    trimmed = []
    for change in changes:
        order = sorted(range(change.numel()), key=lambda i: -abs(float(change.flatten()[i])))[:kept]
        trimmed.append([float(change.flatten()[i]) if i in order else 0.0 for i in range(change.numel())])
    merged = []
    for column in zip(*trimmed, strict=True):
        total = sum(column)
        agreeing = [value for value in column if value * total > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=changes.dtype).reshape(changes[0].shape)


@pytest.mark.parametrize("density", [0.1, 0.53, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_ties_equals_its_definition(density: float, count: int) -> None:
    changes = torch.stack([random_change(seed) for seed in range(count)])
    close(ties_merge(changes, density), plain_ties(changes, density))


def test_ties_by_hand() -> None:
    # of four entries the two largest stay: (4, -3, 0, 0), (0, 5, -2, 0); the second entry agrees with the heavier sign
    changes = torch.tensor([[[4.0, -3.0], [1.0, 0.5]], [[0.5, 5.0], [-2.0, 1.0]]])
    assert ties_merge(changes, 0.5).tolist() == [[4.0, 5.0], [-2.0, 0.0]]


def plain_choice(memory: SideMemory, inputs: Tensor, output: Tensor, lengths: list[int]) -> list[int]:
    """Row by row, memory by memory, token by token."""
    chosen = []
    for row, length in enumerate(lengths):
        best, found = -1.0, UNTOUCHED
        for number, change in enumerate(memory.changes):
            gaps = []
            for token in range(length):
                native = output[row, token]
                side = native + change @ inputs[row, token]
                gaps.append(float((torch.nn.functional.silu(native) - torch.nn.functional.silu(side)).norm()))
            gap = max(gaps) if length > LONG_PROMPT else sum(gaps) / length
            if gap >= memory.rules.act_ratio * memory.gaps[number] and gap > best:
                best, found = gap, number
        chosen.append(found)
    return chosen


@pytest.mark.parametrize("width", [6, LONG_PROMPT + 4])
def test_rows_choose_and_pass_through_their_memory(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(12, width, INPUTS, generator=generator, dtype=torch.float64)
    inputs *= torch.rand(12, 1, 1, generator=generator, dtype=torch.float64)
    output = torch.randn(12, width, OUTPUTS, generator=generator, dtype=torch.float64)
    lengths = [width - row % 5 for row in range(12)]
    batch = Batch.from_rows([[1] * width] * 12, prompt_lengths=lengths)
    told = ForwardPass.of(batch)
    level = 1.6 if width < LONG_PROMPT else 4.5
    rules = dataclasses.replace(RULES, merge_freq=6)
    memory = SideMemory(torch.stack([random_change(1), random_change(2)]), (level, 1.1 * level), (2, 2), rules)
    decided = memory.decide(inputs, output, told)
    assert decided.tolist() == plain_choice(memory, inputs, output, lengths)
    assert set(decided.tolist()) == {UNTOUCHED, 0, 1}
    changed = memory.replaced(inputs, output, decided, told)
    for row, found in enumerate(decided.tolist()):
        if found == UNTOUCHED:
            assert torch.equal(changed[row], output[row])
        else:
            close(changed[row], output[row] + inputs[row] @ memory.changes[found].T)


def test_the_file_keeps_every_piece(tmp_path: Path) -> None:
    memory = SideMemory(torch.stack([random_change(1), random_change(2)]), (1.5, 2.5), (2, 1), RULES)
    Edit((FACT,), "wise", {}, "f" * 64, (ModuleEdit(1, replacement=memory),)).save(tmp_path / "edit")
    found = Edit.load(tmp_path / "edit").modules[0].replacement
    assert isinstance(found, SideMemory)
    assert torch.equal(found.changes, memory.changes)
    assert (found.gaps, found.counts, found.rules) == (memory.gaps, memory.counts, memory.rules)


def test_memories_of_different_rules() -> None:
    other = MemoryRules("silu", act_ratio=0.9, save_freq=2, merge_freq=4)
    with pytest.raises(HparamError, match="follow one rule; make the edits with the same act_ratio"):
        SideMemory.stacked([piece(0), piece(1, rules=other)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "sillu"}, "activation 'sillu' is unknown"),
        ({"save_freq": 300}, "merge_freq=1000 must be a multiple of save_freq=300"),
        ({"save_freq": 0}, "save_freq=0, both at least 1"),
        ({"density": 0.0}, r"density=0\.0 must lie in 0 to 1"),
        ({"act_ratio": 0.0}, r"act_ratio=0\.0 above 0"),
    ],
)
def test_rules_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HparamError, match=message):
        MemoryRules(**{"activation": "silu", **arguments})


def test_parts_that_make_no_memory() -> None:
    with pytest.raises(LayerError, match=r"changes \(3, 5\) torch.float64 with 1 gaps"):
        SideMemory(random_change(0), (1.0,), (1,), RULES)
    with pytest.raises(HparamError, match=r"gaps \[0\.0\] and counts \[1\] must be positive"):
        SideMemory(random_change(0)[None], (0.0,), (1,), RULES)
    with pytest.raises(NonFiniteError, match="holds NaN or infinity"):
        SideMemory(random_change(0)[None] * torch.nan, (1.0,), (1,), RULES)
