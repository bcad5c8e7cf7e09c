"""Edit: its parts, adapters added and removed, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rep_fast.edits import Edit, KeyAdapter, LowRank, ModuleEdit
from rep_fast.errors import CorruptFileError, FingerprintError, LayerError, MissingFileError, OutputError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.tensor_files import load_tensors, save_tensors


def make_edit(fingerprint: str = "f" * 64, **changes: Any) -> Edit:
    generator = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(32, 2, generator=generator), torch.randn(2, 48, generator=generator))
    adapters = (
        KeyAdapter.initial(48, rank=2, seed=1, trained_for=["Slovenia"]),
        KeyAdapter.initial(48, rank=3, seed=2, tau=0.7, dtype=torch.float64),
    )
    fields: dict[str, Any] = {
        "facts": (Fact("{} is in", "Köln", "Asia", "Europe"), Fact("{} is", "a", "b")),
        "method": "rome",
        "hparams": {"layer": 1, "lr": 0.5, "list": [1, 2]},
        "fingerprint": fingerprint,
        "modules": (ModuleEdit(1, delta, adapters), ModuleEdit(2, None, adapters[:1])),
        "notes": {"rho": {"before": 0.1}},
        "tensors": {
            "z": torch.randn(48, generator=generator),
            "v_star.1": torch.randn(32, generator=generator).to(torch.bfloat16),
        },
        "model_name": "tiny",
    }
    return Edit(**(fields | changes))


def assert_same(one: Edit, two: Edit) -> None:
    for name in ("facts", "method", "hparams", "fingerprint", "notes", "model_name", "layers"):
        assert getattr(one, name) == getattr(two, name)
    assert one.tensors.keys() == two.tensors.keys()
    pairs = [(one.tensors[name], two.tensors[name]) for name in one.tensors]
    for mine, theirs in zip(one.modules, two.modules, strict=True):
        assert (mine.delta is None) == (theirs.delta is None)
        if mine.delta is not None and theirs.delta is not None:
            pairs += [(mine.delta.left, theirs.delta.left), (mine.delta.right, theirs.delta.right)]
        for first, second in zip(mine.adapters, theirs.adapters, strict=True):
            assert (first.tau, first.trained_for, first.notes) == (second.tau, second.trained_for, second.notes)
            pairs += list(zip(first.weights, second.weights, strict=True))
    for first_tensor, second_tensor in pairs:
        assert first_tensor.dtype == second_tensor.dtype
        assert torch.equal(first_tensor, second_tensor)


def test_layers_and_modules() -> None:
    edit = make_edit()
    assert edit.layers == (1, 2)
    assert edit.module(2) is edit.modules[1]
    with pytest.raises(LayerError, match=r"changes layers \[1, 2\], not down of 0"):
        edit.module(0)


def test_two_entries_for_a_layer() -> None:
    with pytest.raises(LayerError, match=r"one entry per module, got down of 1, down of 1"):
        make_edit(modules=(ModuleEdit(1), ModuleEdit(1)))


def test_adapters_are_replaced_without_touching_the_rest() -> None:
    edit, adapter = make_edit(), KeyAdapter.initial(48, seed=9)
    changed = edit.with_adapters({1: adapter})
    assert changed.module(1).adapters == (adapter,)
    assert changed.modules[0].delta is edit.modules[0].delta
    assert changed.module(2).adapters == edit.module(2).adapters
    assert edit.with_adapters({1: [adapter, adapter]}).module(1).adapters == (adapter, adapter)
    with pytest.raises(LayerError, match="not down of 0"):
        edit.with_adapters({0: adapter})


def test_a_saved_edit_loads_unchanged(tmp_path: Path) -> None:
    edit = make_edit()
    edit.save(tmp_path / "edit.safetensors")
    assert_same(Edit.load(tmp_path / "edit.safetensors"), edit)


def test_loading_for_the_right_model_and_for_another(tmp_path: Path, tiny_llama: EditableLM) -> None:
    make_edit(tiny_llama.fingerprint).save(tmp_path / "right")
    Edit.load(tmp_path / "right", tiny_llama)
    make_edit().save(tmp_path / "wrong")
    with pytest.raises(
        FingerprintError, match=rf"made for tiny \(ffffffffffff…\), the model here is {tiny_llama.name}"
    ):
        Edit.load(tmp_path / "wrong", tiny_llama)


def test_an_edit_that_does_not_fit_its_model_is_refused_at_loading(tmp_path: Path, tiny_llama: EditableLM) -> None:
    make_edit(tiny_llama.fingerprint, modules=(ModuleEdit(9),)).save(tmp_path / "edit")
    with pytest.raises(LayerError, match="layer 9"):
        Edit.load(tmp_path / "edit", tiny_llama)


def altered(path: Path, **changes: Any) -> Path:
    """The file with another description, its digest in order: what another version might write."""
    make_edit().save(path)
    description, tensors = load_tensors(path, kind="edit", version=1)
    for name in changes.pop("without", ()):
        del tensors[name]
    save_tensors(path, tensors, kind="edit", version=changes.pop("version", 1), description=description | changes)
    return path


def test_an_unknown_kind_of_delta(tmp_path: Path) -> None:
    path = altered(
        tmp_path / "edit", modules=[{"layer": 1, "linear": "down", "delta": {"kind": "wormhole"}, "adapters": []}]
    )
    with pytest.raises(CorruptFileError, match="delta of unknown kind 'wormhole' at layer 1; update rep_fast"):
        Edit.load(path)


def test_a_newer_format(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="format version 99"):
        Edit.load(altered(tmp_path / "edit", version=99))


@pytest.mark.parametrize(
    "changes",
    [
        {"without": ["layer.1.down.left"]},
        {"facts": [{"prompt": "no slot"}]},
        {"modules": 3},
        {"method": []} | {"facts": 1},
    ],
)
def test_a_description_that_fits_no_edit(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptFileError, match="does not describe a usable edit"):
        Edit.load(altered(tmp_path / "edit", **changes))


def test_a_truncated_file(tmp_path: Path) -> None:
    make_edit().save(tmp_path / "edit")
    content = (tmp_path / "edit").read_bytes()
    (tmp_path / "edit").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptFileError, match="damaged"):
        Edit.load(tmp_path / "edit")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no edit file"):
        Edit.load(tmp_path / "edit")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        make_edit().save(tmp_path / "file" / "edit")


def test_notes_that_are_no_json_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be stored as JSON"):
        make_edit(notes={"x": torch.zeros(1)}).save(tmp_path / "edit")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    make_edit().save(tmp_path / "edit")
    with pytest.raises(OutputError):
        make_edit(notes={"x": torch.zeros(1)}).save(tmp_path / "edit")
    assert_same(Edit.load(tmp_path / "edit"), make_edit())
