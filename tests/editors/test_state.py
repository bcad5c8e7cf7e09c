"""EditorState: gathered from edits, saved, and refused by other models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from rep_fast.editors import EditorState
from rep_fast.edits import Edit, ModuleEdit
from rep_fast.errors import CorruptFileError, FingerprintError, LayerError, MissingFileError
from rep_fast.models import EditableLM
from rep_fast.tensor_files import save_tensors


def edit_with(lm: EditableLM, keys: Mapping[int, torch.Tensor | None]) -> Edit:
    modules = tuple(
        ModuleEdit(layer, vectors={} if rows is None else {"past_keys": rows}) for layer, rows in keys.items()
    )
    return Edit((), "alphaedit", {}, lm.fingerprint, modules, model_name=lm.name)


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_keys_of_all_edits_in_order(tiny_llama: EditableLM) -> None:
    first, second, third = rows(2, 48, 1), rows(1, 48, 2), rows(3, 48, 3)
    keys = ({0: first, 1: third}, {0: None}, {0: second})
    state = EditorState.of([edit_with(tiny_llama, one) for one in keys])
    assert torch.equal(state.past_keys[0], torch.cat([first, second]))
    assert torch.equal(state.past_keys[1], third)
    like = torch.zeros(48, 1, dtype=torch.float64)
    columns = state.columns(0, like=like)
    assert columns is not None
    assert torch.equal(columns, torch.cat([first, second]).T.double())
    assert state.columns(2, like=like) is None
    assert EditorState.of([]).past_keys == {}


def test_round_trip(tiny_llama: EditableLM, tmp_path: Path) -> None:
    state = EditorState.of([edit_with(tiny_llama, {0: rows(2, 48, 1), 2: rows(2, 48, 2)})])
    state.save(tmp_path / "state.safetensors")
    loaded = EditorState.load(tmp_path / "state.safetensors", tiny_llama)
    assert loaded.fingerprint == tiny_llama.fingerprint
    assert {layer: keys.tolist() for layer, keys in loaded.past_keys.items()} == {
        layer: keys.tolist() for layer, keys in state.past_keys.items()
    }
    EditorState().save(tmp_path / "empty.safetensors")
    assert EditorState.load(tmp_path / "empty.safetensors", tiny_llama).past_keys == {}


def test_other_models_are_refused(tiny_llama: EditableLM, tiny_gpt2: EditableLM, tmp_path: Path) -> None:
    state = EditorState.of([edit_with(tiny_gpt2, {0: rows(2, 48, 1)})])
    state.save(tmp_path / "state.safetensors")
    for refuse in (
        lambda: state.check_model(tiny_llama),
        lambda: EditorState.load(tmp_path / "state.safetensors", tiny_llama),
    ):
        with pytest.raises(FingerprintError, match=r"state belongs to tiny-gpt2 .* start with an empty state"):
            refuse()
    with pytest.raises(FingerprintError, match="keep one state per model"):
        state.after(edit_with(tiny_llama, {0: rows(1, 48, 1)}))


def test_widths_and_layers_must_fit(tiny_llama: EditableLM) -> None:
    narrow = EditorState({0: rows(2, 40, 1)}, tiny_llama.fingerprint)
    with pytest.raises(LayerError, match=r"layer 0 have shape \(2, 40\), the keys there are 48 wide"):
        narrow.check_model(tiny_llama)
    with pytest.raises(LayerError, match="layer 5 lies outside"):
        EditorState({5: rows(2, 48, 1)}, tiny_llama.fingerprint).check_model(tiny_llama)


def test_files_that_are_no_state(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        EditorState.load(tmp_path / "none.safetensors")
    save_tensors(tmp_path / "odd.safetensors", {"key": torch.zeros(1)}, kind="editor-state", version=1, description={})
    with pytest.raises(CorruptFileError, match="does not describe an editor state"):
        EditorState.load(tmp_path / "odd.safetensors")
