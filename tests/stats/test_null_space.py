"""Null spaces of a second moment: the projector, what is stored, what is found in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rep_fast.editors.least_squares import solve_batch
from rep_fast.errors import HparamError, LayerError
from rep_fast.stats import SecondMoments, null_space
from rep_fast.stats.null_space import find_null_space

M = 24
SPECTRUM = torch.cat([torch.linspace(1e-4, 1e-2, 10), torch.linspace(0.5, 3, M - 10)]).double()


def second_moment(seed: int = 0) -> tuple[Tensor, Tensor]:
    """C and its eigenvectors, eigenvalues ascending as in SPECTRUM."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(M, M, generator=generator, dtype=torch.float64)).Q
    matrix = (vectors * SPECTRUM) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


def moments(seed: int = 0, fingerprint: str = "abc") -> SecondMoments:
    return SecondMoments.from_matrices({3: second_moment(seed)[0]}, {3: 99}, corpus="made up", fingerprint=fingerprint)


@pytest.mark.parametrize(
    ("threshold", "share", "size"), [(0.02, None, 10), (None, 0.25, 6), (None, 0.75, 18), (1.0, None, 13)]
)
def test_projector_keeps_small_eigenvalues_alone(threshold: float | None, share: float | None, size: int) -> None:
    matrix, vectors = second_moment()
    space = find_null_space(matrix, threshold=threshold, share=share)
    wanted = vectors[:, :size] @ vectors[:, :size].T
    found = space.project(torch.eye(M, dtype=torch.float64))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert space.dimension == size
    assert space.eigenvalue == pytest.approx(float(SPECTRUM[size - 1]), rel=1e-6)
    # the smaller side is what is held
    assert space.basis.shape == (M, min(size, M - size))
    assert space.is_complement == (size > M - size)


def test_found_once_per_second_moment_and_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float | None] = []

    def counting(matrix: Tensor, *, threshold: float | None, share: float | None) -> null_space.NullSpace:
        calls.append(threshold)
        return find_null_space(matrix, threshold=threshold, share=share)

    monkeypatch.setattr(null_space, "find_null_space", counting)
    held = moments()
    first = held.null_space(3, threshold=0.02, cache_dir=tmp_path)
    assert held.null_space(3, threshold=0.02, cache_dir=tmp_path) is first
    again = moments().null_space(3, threshold=0.02, cache_dir=tmp_path)
    assert len(calls) == 1
    assert torch.equal(again.basis, first.basis)
    assert (again.is_complement, again.eigenvalue) == (first.is_complement, first.eigenvalue)
    for other, threshold in ((moments(), 0.6), (moments(1), 0.02), (moments(fingerprint="def"), 0.02)):
        other.null_space(3, threshold=threshold, cache_dir=tmp_path)
    assert len(calls) == 4


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_an_update_from_a_stored_basis_is_the_dense_one(tmp_path: Path, share: float) -> None:
    """ΔWᵀ = (P(KKᵀ + K_past K_pastᵀ) + L2·I)⁻¹ PK Rᵀ with moments kept in float32 and the basis read from its file."""
    width, l2 = 256, 0.1
    shapes = ((512, width), (width, 9), (width, 5), (12, 9))
    generator = torch.Generator().manual_seed(1)
    corpus, keys, past, residuals = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    matrices = {3: (corpus.T @ corpus / 512).float()}
    made = [SecondMoments.from_matrices(matrices, {3: 512}, corpus="made up", fingerprint="abc") for _ in range(2)]
    made[0].null_space(3, threshold=None, share=share, cache_dir=tmp_path)
    space = made[1].null_space(3, threshold=None, share=share, cache_dir=tmp_path)
    found = solve_batch(keys, residuals, metric=space.project, ridge=l2, past=past).delta().to_dense()
    vectors = torch.linalg.eigh(made[0].second_moment(3)).eigenvectors[:, : round(share * width)]
    projector = vectors @ vectors.T
    system = projector @ (keys @ keys.T + past @ past.T) + l2 * torch.eye(width, dtype=torch.float64)
    wanted = torch.linalg.solve(system, projector @ keys @ residuals.T).T
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-8


def test_a_damaged_file_is_found_again_and_an_unwritable_place_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = moments().null_space(3, threshold=0.02, cache_dir=tmp_path)
    (path,) = tmp_path.glob("null-spaces/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert torch.equal(moments().null_space(3, threshold=0.02, cache_dir=tmp_path).basis, first.basis)
    assert "found again" in caplog.text
    (tmp_path / "file").write_text("no directory")
    moments().null_space(3, threshold=0.02, cache_dir=tmp_path / "file")
    assert "is not kept" in caplog.text


def test_choices_that_leave_nothing_are_named() -> None:
    held = moments()
    for threshold, share in ((None, None), (0.1, 0.5)):
        with pytest.raises(HparamError, match="give one of them"):
            held.null_space(3, threshold=threshold, share=share)
    with pytest.raises(HparamError, match=r"null_share=1.5 is out of range"):
        held.null_space(3, threshold=None, share=1.5)
    for threshold, size in ((1e-6, 0), (9.0, 24)):
        with pytest.raises(HparamError, match=rf"takes {size} of 24 directions, whose eigenvalues go from 1.00e-04"):
            held.null_space(3, threshold=threshold)
    with pytest.raises(LayerError, match="no second moment of layer 5, only of"):
        held.null_space(5, threshold=0.02)
