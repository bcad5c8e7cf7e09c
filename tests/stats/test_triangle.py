"""Packed triangles."""

from __future__ import annotations

import pytest
import torch

from rep_fast.stats.triangle import packed, unpacked, width_of


@pytest.mark.parametrize("width", [1, 2, 3, 17, 511, 513, 1025])
def test_packing_and_unpacking_are_inverse(width: int) -> None:
    matrix = torch.randn(width, width, dtype=torch.float64)
    matrix = matrix + matrix.T
    triangle = packed(matrix)
    assert triangle.shape == (width * (width + 1) // 2,)
    assert width_of(triangle) == width
    assert torch.equal(unpacked(triangle), matrix)
    assert torch.equal(unpacked(triangle, dtype=torch.float32), matrix.float())


def test_rows_of_the_lower_triangle_one_after_another() -> None:
    matrix = torch.tensor([[1.0, 9.0, 9.0], [2.0, 3.0, 9.0], [4.0, 5.0, 6.0]])
    assert packed(matrix).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("length", [0, 2, 4, 5, 7, 11008 * 11009 // 2 + 1])
def test_other_lengths_are_no_triangle(length: int) -> None:
    assert width_of(torch.empty(length, device="meta")) == 0


@pytest.mark.parametrize("width", [11008, 18944])
def test_large_widths_are_found_exactly(width: int) -> None:
    assert width_of(torch.empty(width * (width + 1) // 2, device="meta")) == width
