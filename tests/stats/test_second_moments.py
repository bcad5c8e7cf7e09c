"""SecondMoments: matrices, solvers, merging, files."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rep_fast.edits import Edit
from rep_fast.errors import (
    CorruptFileError,
    FingerprintError,
    HparamError,
    LayerError,
    MissingFileError,
    NonFiniteError,
    OutputError,
    SingularMomentError,
)
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments

M = 6


def keys_of(n_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_tokens, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(keys: torch.Tensor, *, layers: tuple[int, ...] = (3,), fingerprint: str = "f" * 64) -> SecondMoments:
    matrix = keys.T @ keys / len(keys)
    return SecondMoments.from_matrices(
        dict.fromkeys(layers, matrix),
        dict.fromkeys(layers, len(keys)),
        corpus="random",
        fingerprint=fingerprint,
        model_name="tiny",
    )


def test_matrices_counts_and_layers() -> None:
    keys = keys_of(20)
    moments = moments_of(keys, layers=(5, 3))
    assert moments.layers == (3, 5)
    assert moments.counts == {3: 20, 5: 20}
    assert moments.key_width(5) == M
    matrix = moments.second_moment(3)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix, keys.T @ keys / 20, rtol=1e-12, atol=0)


def test_solver_solves_and_is_kept() -> None:
    moments = moments_of(keys_of(50))
    solver = moments.solver(3)
    assert solver is moments.solver(3)
    assert solver is not moments.solver(3, ridge=0.1)
    right = torch.randn(M, 2, dtype=torch.float64)
    torch.testing.assert_close(moments.second_moment(3) @ solver.solve(right), right, rtol=1e-9, atol=1e-9)


def test_too_few_tokens_name_both_numbers_and_the_remedy() -> None:
    with pytest.raises(SingularMomentError, match=r"width 6 from 5 tokens .*collect more tokens"):
        moments_of(keys_of(5)).solver(3)


def test_too_few_tokens_are_accepted_with_a_ridge() -> None:
    assert moments_of(keys_of(5)).solver(3, ridge=1e-3).report.ridge == 1e-3


def test_a_neuron_that_never_fires_gets_the_smallest_ridge_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    keys = keys_of(50)
    keys[:, 2] = 0
    with caplog.at_level(logging.WARNING):
        solver = moments_of(keys).solver(3)
    assert solver.report.ridge == 1e-8
    assert "layer 3 is singular; used ridge 1e-08" in caplog.text


def test_a_layer_that_was_not_collected() -> None:
    moments = moments_of(keys_of(20))
    for ask in (moments.second_moment, moments.solver, moments.key_width):
        with pytest.raises(LayerError, match=r"no second moment of layer 4, only of \[3\]; collect it"):
            ask(4)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 9))
def test_merging_shards_is_collecting_the_whole(one: int, two: int, three: int, seed: int) -> None:
    shards = [keys_of(count, seed + number) for number, count in enumerate((one, two, three))]
    a, b, c = (moments_of(shard) for shard in shards)
    whole = moments_of(torch.cat(shards))
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert merged.counts == whole.counts
        torch.testing.assert_close(merged.second_moment(3), whole.second_moment(3), rtol=1e-9, atol=1e-12)


def test_merging_what_does_not_belong_together() -> None:
    moments = moments_of(keys_of(20))
    with pytest.raises(FingerprintError, match="different models"):
        moments.merge(moments_of(keys_of(20), fingerprint="e" * 64))
    with pytest.raises(HparamError, match=r"layers \(3,\) and \(4,\)"):
        moments.merge(moments_of(keys_of(20), layers=(4,)))
    with_bos, without_bos = moments_of(keys_of(20)), moments_of(keys_of(20))
    with_bos.settings, without_bos.settings = {"include_bos": True}, {"include_bos": False}
    with pytest.raises(HparamError, match="include_bos differs: True and False"):
        with_bos.merge(without_bos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_file_loads_unchanged(tmp_path: Path, dtype: torch.dtype) -> None:
    keys = keys_of(20).to(dtype)
    moments = moments_of(keys, layers=(3, 10))
    moments.settings = {"include_bos": True, "tokens": None}
    moments.save(tmp_path / "moments")
    loaded = SecondMoments.load(tmp_path / "moments")
    for name in ("layers", "counts", "corpus", "fingerprint", "model_name", "settings"):
        assert getattr(loaded, name) == getattr(moments, name)
    for layer in (3, 10):
        assert torch.equal(loaded.second_moment(layer), moments.second_moment(layer))


def test_the_file_holds_one_triangle_in_its_dtype(tmp_path: Path) -> None:
    wide = torch.eye(200)
    SecondMoments.from_matrices({0: wide}, {0: 1}, corpus="c", fingerprint="f").save(tmp_path / "moments")
    assert (tmp_path / "moments").stat().st_size < 4 * 200 * 201 / 2 + 1000


def test_moments_of_another_model(tmp_path: Path, tiny_llama: EditableLM) -> None:
    moments_of(keys_of(20)).save(tmp_path / "moments")
    with pytest.raises(
        FingerprintError, match=rf"collected on tiny \(ffffffffffff…\), the model here is {tiny_llama.name}"
    ):
        SecondMoments.load(tmp_path / "moments", tiny_llama)
    moments_of(keys_of(20), fingerprint=tiny_llama.fingerprint).save(tmp_path / "moments")
    loaded = SecondMoments.load(tmp_path / "moments", tiny_llama)
    assert loaded.device_of(loaded.layers[0]) == tiny_llama.device


def test_truncated_altered_renamed_and_missing_files(tmp_path: Path) -> None:
    moments_of(keys_of(20)).save(tmp_path / "moments")
    content = (tmp_path / "moments").read_bytes()
    (tmp_path / "truncated").write_bytes(content[:-9])
    with pytest.raises(CorruptFileError, match=r"truncated is damaged"):
        SecondMoments.load(tmp_path / "truncated")
    (tmp_path / "altered").write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    with pytest.raises(CorruptFileError, match=r"altered was altered"):
        SecondMoments.load(tmp_path / "altered")
    Edit((), "rome", {}, "f", ()).save(tmp_path / "renamed")
    with pytest.raises(CorruptFileError, match="kind 'edit', expected 'second-moments'"):
        SecondMoments.load(tmp_path / "renamed")
    with pytest.raises(MissingFileError, match="there is no second-moments file"):
        SecondMoments.load(tmp_path / "absent")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        moments_of(keys_of(20)).save(tmp_path / "file" / "moments")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matrices_with_nan_or_infinity(value: float) -> None:
    matrix = torch.eye(3)
    matrix[2, 1] = value
    with pytest.raises(NonFiniteError, match="layer 1 holds NaN"):
        SecondMoments.from_matrices({1: matrix}, {1: 9}, corpus="c", fingerprint="f")


def test_shapes_and_layers_that_do_not_fit() -> None:
    with pytest.raises(LayerError, match=r"must be \[M, M\], got \(2, 3\)"):
        SecondMoments.from_matrices({1: torch.zeros(2, 3)}, {1: 9}, corpus="c", fingerprint="f")
    with pytest.raises(LayerError, match=r"layers \[1\] but counts for \[2\]"):
        SecondMoments({1: torch.zeros(3)}, {2: 9}, corpus="c", fingerprint="f")
    with pytest.raises(LayerError, match="has 4 entries, no triangle has"):
        SecondMoments({1: torch.zeros(4)}, {1: 9}, corpus="c", fingerprint="f")
