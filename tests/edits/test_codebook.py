"""GRACE's codebook: radii by hand-made cases and a plain loop, the choice of an entry, where its value goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rep_fast.edits import Codebook, Edit, ModuleEdit
from rep_fast.edits.codebook import GAP, REACH, Extent
from rep_fast.edits.replacement import UNTOUCHED
from rep_fast.errors import CorruptFileError, HparamError, LayerError, NonFiniteError
from rep_fast.facts import Fact
from rep_fast.models import Batch, ForwardPass

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")


def on_a_line(*entries: tuple[float, str], radius: float = 1.0, extent: Extent = "replace_last") -> Codebook:
    """Keys (x, 0); the value of entry i is (i, i, i)."""
    keys = torch.tensor([[place, 0.0] for place, _ in entries], dtype=torch.float64)
    values = torch.arange(len(entries), dtype=torch.float64)[:, None].expand(-1, 3).clone()
    return Codebook(keys, values, tuple(label for _, label in entries), (radius,) * len(entries), extent)


@pytest.mark.parametrize(
    ("entries", "reach"),
    [
        # beyond ε + ε_i: both keep their own
        ([(0.0, "a"), (2.5, "b")], [1, 1]),
        ([(0.0, "a"), (2.5, "a")], [1, 1]),
        # within, another label: the space between is halved
        ([(0.0, "a"), (1.5, "b")], [0.75 - GAP, 0.75]),
        ([(0.0, "a"), (2.0, "b")], [1 - GAP, 1]),
        # within, the same label: the earlier one grows, and never shrinks
        ([(0.0, "a"), (1.5, "a")], [1.5 * REACH, -1]),
        ([(0.0, "a"), (0.5, "a")], [1, -1]),
        # the grown radius is what a third one meets
        ([(0.0, "a"), (1.5, "a"), (-2.4, "b")], [1.2 - GAP, -1, 1.2]),
        # only the nearest counts
        ([(0.0, "a"), (3.0, "b"), (1.6, "a")], [1, 0.7 - GAP, 0.7]),
        # the same key again: another label supersedes, and then meets what is left
        ([(0.0, "a"), (0.0, "b")], [-1, 1]),
        ([(0.0, "a"), (2.5, "c"), (2.5, "a"), (0.9, "a")], [1, -1, 1, -1]),
        ([(0.0, "a"), (1.5, "b"), (1.5, "a")], [1.5 * REACH, -1, -1]),
    ],
)
def test_radii_of_hand_made_cases(entries: list[tuple[float, str]], reach: list[float]) -> None:
    torch.testing.assert_close(
        on_a_line(*entries).reach, torch.tensor(reach, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def plain_reach(keys: Sequence[Sequence[float]], labels: Sequence[str], radii: Sequence[float]) -> dict[int, float]:
    """The rules, entry by entry on a dictionary of acting ones."""
    acting: dict[int, float] = {}
    for new, (key, label, radius) in enumerate(zip(keys, labels, radii, strict=True)):
        while True:
            ranked = sorted((sum((a - b) ** 2 for a, b in zip(keys[i], key, strict=True)) ** 0.5, i) for i in acting)
            if not ranked or ranked[0][0] > radius + acting[ranked[0][1]]:
                acting[new] = radius
                break
            distance, near = ranked[0]
            if labels[near] == label:
                acting[near] = max(acting[near], distance * REACH)
                break
            if distance / 2 > GAP:
                acting[near], acting[new] = distance / 2 - GAP, distance / 2
                break
            del acting[near]
    return acting


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_radii_and_choice_equal_a_plain_loop(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-3, 4, (count, 2), generator=generator).double()
    labels = tuple("ab"[i] for i in torch.randint(0, 2, (count,), generator=generator).tolist())
    radii = tuple((0.5 + torch.rand(count, generator=generator, dtype=torch.float64)).tolist())
    book = Codebook(keys, torch.zeros(count, 1, dtype=torch.float64), labels, radii)
    acting = plain_reach(keys.tolist(), labels, radii)
    for entry, reach in enumerate(book.reach.tolist()):
        assert reach == pytest.approx(acting.get(entry, -1.0), rel=1e-12)
    queries = 3 * torch.randn(20, 1, 2, generator=generator, dtype=torch.float64)
    chosen = book.decide(queries, queries, ForwardPass(torch.ones(20, dtype=torch.int64))).tolist()
    for query, found in zip(queries[:, 0], chosen, strict=True):
        distance, near = min((float((query - keys[i]).norm()), i) for i in acting)
        assert found == (near if distance <= acting[near] else UNTOUCHED)


def test_codebooks_in_any_grouping_are_one() -> None:
    whole = on_a_line((0, "a"), (1.5, "b"), (1.2, "a"), (4, "b"))
    singles = [
        Codebook(whole.keys[[i]], whole.values[[i]], whole.labels[i : i + 1], whole.radii[i : i + 1]) for i in range(4)
    ]
    for split in range(1, 4):
        grouped = Codebook.stacked([Codebook.stacked(singles[:split]), Codebook.stacked(singles[split:])])
        assert torch.equal(grouped.reach, whole.reach)
        assert torch.equal(grouped.values, whole.values)
        assert grouped.labels == whole.labels


def told_rows() -> tuple[ForwardPass, Tensor]:
    """Rows of 4, 2 and 3 tokens with prompts of 3, 2 and 1; their queries lie at 0.2, 9 and 3."""
    inputs = torch.full((3, 4, 2), 50.0, dtype=torch.float64)
    inputs[0, 2], inputs[1, 1], inputs[2, 0] = (torch.tensor([place, 0.0]).double() for place in (0.2, 9.0, 3.0))
    batch = Batch.from_rows([[1, 2, 3, 4], [1, 2], [1, 2, 3]], prompt_lengths=[3, 2, 1])
    return ForwardPass.of(batch), inputs


@pytest.mark.parametrize(
    ("extent", "touched"),
    [
        ("replace_last", {(0, 2), (2, 0)}),
        ("replace_prompt", {(0, 0), (0, 1), (0, 2), (2, 0)}),
        ("replace_all", {(row, token) for row in (0, 2) for token in range(4)}),
    ],
)
def test_where_a_value_goes(extent: Extent, touched: set[tuple[int, int]]) -> None:
    book = on_a_line((0.0, "a"), (3.0, "b"), extent=extent)
    told, inputs = told_rows()
    output = torch.randn(3, 4, 3, dtype=torch.float64)
    decided = book.decide(inputs, output, told)
    assert decided.tolist() == [0, UNTOUCHED, 1]
    changed = book.replaced(inputs, output, decided, told)
    for row in range(3):
        for token in range(4):
            expected = book.values[0 if row == 0 else 1] if (row, token) in touched else output[row, token]
            assert torch.equal(changed[row, token], expected)


def test_later_steps_of_a_generation() -> None:
    """The prompt's last token is behind: only what replaces everywhere goes on, by what was decided then."""
    output, decided = torch.randn(2, 1, 3, dtype=torch.float64), torch.tensor([1, UNTOUCHED])
    told = ForwardPass(torch.tensor([3, 3]), begin=4)
    for extent in ("replace_last", "replace_prompt"):
        book = on_a_line((0.0, "a"), (3.0, "b"), extent=extent)
        assert torch.equal(book.replaced(output, output, decided, told), output)
    changed = on_a_line((0.0, "a"), (3.0, "b"), extent="replace_all").replaced(output, output, decided, told)
    assert changed[0, 0].tolist() == [1, 1, 1]
    assert torch.equal(changed[1], output[1])


def test_the_file_keeps_every_entry(tmp_path: Path) -> None:
    book = on_a_line((0.0, "a"), (1.5, "b"), extent="replace_prompt")
    module = ModuleEdit(1, linear="up", replacement=book)
    Edit((FACT,), "grace", {}, "f" * 64, (module,)).save(tmp_path / "edit")
    (loaded,) = Edit.load(tmp_path / "edit").modules
    assert loaded.place == (1, "up")
    assert loaded.delta is None
    found = loaded.replacement
    assert isinstance(found, Codebook)
    assert torch.equal(found.keys, book.keys)
    assert torch.equal(found.values, book.values)
    assert (found.labels, found.radii, found.extent) == (book.labels, book.radii, book.extent)


def test_a_file_of_an_unknown_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleEdit(1, replacement=on_a_line((0.0, "a")))
    Edit((FACT,), "grace", {}, "f" * 64, (module,)).save(tmp_path / "edit")
    monkeypatch.setattr("rep_fast.edits.edit_file.REPLACEMENTS", {})
    with pytest.raises(CorruptFileError, match="replacement of unknown kind 'codebook' at layer 1; update rep_fast"):
        Edit.load(tmp_path / "edit")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": ("a",)}, LayerError, r"keys \(2, 2\), values \(2, 3\), 1 labels and 2 radii make no codebook"),
        ({"values": torch.zeros(2, 3)}, LayerError, "must share one floating dtype"),
        ({"extent": "replace_some"}, HparamError, "no extent 'replace_some'; use one of replace_last"),
        ({"radii": (1.0, 0.0)}, HparamError, "must be positive and finite"),
        ({"keys": torch.full((2, 2), torch.nan).double()}, NonFiniteError, "row 0 of the codebook's keys"),
        ({"values": torch.full((2, 3), torch.inf).double()}, NonFiniteError, "row 0 of the codebook's values"),
    ],
)
def test_parts_that_make_no_codebook(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    parts = {"keys": torch.zeros(2, 2).double(), "values": torch.zeros(2, 3).double(), "labels": ("a", "b")}
    with pytest.raises(error, match=message):
        Codebook(**{**parts, "radii": (1.0, 1.0), **changes})
