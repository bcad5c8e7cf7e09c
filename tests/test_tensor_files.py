"""Tensor files: exact round trip, and every kind of damage refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rep_fast.errors import CorruptFileError, MissingFileError, OutputError
from rep_fast.tensor_files import load_tensors, save_tensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3),
}


def save(path: Path, *, kind: str = "thing", version: int = 2) -> Path:
    save_tensors(path, TENSORS, kind=kind, version=version, description={"note": "Zürich", "list": [1, None]})
    return path


def test_round_trip_is_exact(tmp_path: Path) -> None:
    description, tensors = load_tensors(save(tmp_path / "t"), kind="thing", version=2)
    assert description == {"note": "Zürich", "list": [1, None]}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_views_and_shared_memory_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_tensors(tmp_path / "t", {"t": base.T, "row": base[1]}, kind="k", version=1, description={})
    _, tensors = load_tensors(tmp_path / "t", kind="k", version=1)
    assert torch.equal(tensors["t"], base.T)
    assert torch.equal(tensors["row"], base[1])


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    assert save(tmp_path / "a").read_bytes() == save(tmp_path / "b").read_bytes()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_every_flipped_bit_is_noticed(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(save(tmp_path / "t").read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(CorruptFileError):
        load_tensors(tmp_path / "t", kind="thing", version=2)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated(tmp_path: Path, kept: int) -> None:
    save(tmp_path / "t").write_bytes(save(tmp_path / "u").read_bytes()[:kept])
    with pytest.raises(CorruptFileError, match="make it again"):
        load_tensors(tmp_path / "t", kind="thing", version=2)


def test_another_kind(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="is a file of kind 'thing', expected 'edit'"):
        load_tensors(save(tmp_path / "t"), kind="edit", version=2)


def test_a_newer_version(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match="format version 2, this rep_fast reads up to 1; update rep_fast"):
        load_tensors(save(tmp_path / "t"), kind="thing", version=1)


def test_somebody_elses_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "t")
    with pytest.raises(CorruptFileError, match="was not written by rep_fast"):
        load_tensors(tmp_path / "t", kind="thing", version=1)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no thing file"):
        load_tensors(tmp_path / "t", kind="thing", version=1)


@pytest.mark.parametrize("value", [object(), float("nan")])
def test_a_description_that_is_no_json(tmp_path: Path, value: object) -> None:
    with pytest.raises(OutputError, match="cannot be stored as JSON"):
        save_tensors(tmp_path / "t", {}, kind="k", version=1, description={"x": value})
    assert not list(tmp_path.iterdir())
