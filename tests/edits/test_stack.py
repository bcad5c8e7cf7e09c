"""Stacks of edits on disk: order, taking back, damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rep_fast.edits import Edit, EditStack, LowRank, ModuleEdit
from rep_fast.errors import CorruptFileError, FingerprintError, HparamError, MissingFileError, OutputError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

TEXT = "Slovenia belongs to the continent of"


def made(lm: EditableLM, seed: int, subject: str = "Slovenia") -> Edit:
    generator = torch.Generator().manual_seed(seed)
    delta = LowRank(
        torch.randn(lm.hidden_size, 1, generator=generator), torch.randn(1, lm.key_width(1), generator=generator)
    )
    fact = Fact("{} belongs to the continent of", subject, "Antarctica", "Europe")
    return Edit((fact,), "rome", {}, lm.fingerprint, (ModuleEdit(1, delta),), model_name=lm.name)


@pytest.fixture
def lm(build_lm: Callable[..., EditableLM]) -> EditableLM:
    return build_lm("llama")


def test_pushed_edits_come_back_in_their_order_and_act_together(lm: EditableLM, tmp_path: Path) -> None:
    edits = [made(lm, 0), made(lm, 1, "Côte d'Ivoire / x"), made(lm, 2)]
    stack = EditStack.create(tmp_path / "s", edits[0])
    for edit in edits[1:]:
        stack = stack.push(edit)
    again = EditStack.open(tmp_path / "s")
    assert again == stack
    assert [edit.facts[0].subject for edit in again.edits(lm)] == [edit.facts[0].subject for edit in edits]
    with edits[0].applied(lm), edits[1].applied(lm), edits[2].applied(lm):
        expected = lm.logits([TEXT])
    clean = lm.logits([TEXT])
    with again.applied(lm):
        assert torch.equal(lm.logits([TEXT]), expected)
    assert lm.active_edits == []
    assert torch.equal(lm.logits([TEXT]), clean)


def test_any_edit_can_be_taken_back_and_its_file_stays(lm: EditableLM, tmp_path: Path) -> None:
    stack = EditStack.create(tmp_path, made(lm, 0)).push(made(lm, 1)).push(made(lm, 2))
    first, second, third = stack.files
    shorter, moved = stack.undo(2)
    assert shorter.files == EditStack.open(tmp_path).files == (first, third)
    assert moved == tmp_path / "undone" / second
    assert torch.equal(Edit.load(moved).modules[0].delta.to_dense(), made(lm, 1).modules[0].delta.to_dense())  # type: ignore[union-attr]
    last, _ = shorter.undo()
    assert last.files == (first,)
    # a number is given once: what was taken back is not overwritten
    assert last.push(made(lm, 5)).files[-1] not in (second, third)


def test_refusals(lm: EditableLM, build_lm: Callable[..., EditableLM], tmp_path: Path) -> None:
    stack = EditStack.create(tmp_path, made(lm, 0))
    with pytest.raises(OutputError, match="holds a stack of edits already"):
        EditStack.create(tmp_path, made(lm, 0))
    with pytest.raises(FingerprintError, match="the stack is of"):
        stack.push(made(build_lm("llama", seed=1), 0))
    for number in (0, 2):
        with pytest.raises(HparamError, match=f"has 1 edits; there is no number {number}"):
            stack.undo(number)
    with pytest.raises(MissingFileError, match="there is no stack of edits in"):
        EditStack.open(tmp_path / "elsewhere")
    (tmp_path / stack.files[0]).unlink()
    with pytest.raises(MissingFileError, match="which is not there; restore the file"):
        EditStack.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "format version 9, this rep_fast reads up to 1"),
        ({"edits": ["../../etc/passwd"]}, "is damaged .*is no file name"),
        ({"edits": 3}, "is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_trusted(
    lm: EditableLM, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    EditStack.create(tmp_path, made(lm, 0))
    manifest = json.loads((tmp_path / "stack.json").read_text())
    (tmp_path / "stack.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CorruptFileError, match=message):
        EditStack.open(tmp_path)
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(CorruptFileError, match="is damaged"):
        EditStack.open(tmp_path)
