from __future__ import annotations

import pytest
import torch

from rep_fast.errors import TokenizationError
from rep_fast.models import Batch

ROWS = [[4, 5, 6], [7], [8, 9, 8, 9, 8], [0, 0]]


def test_padding_stands_right_and_lengths_are_kept():
    batch = Batch.from_rows(ROWS, pad_id=0)
    assert batch.input_ids.tolist()[0] == [4, 5, 6, 0, 0]
    assert batch.lengths.tolist() == [3, 1, 5, 2]
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 1, 5, 2]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert (batch.n_rows, batch.n_tokens) == (4, 11)


def test_tokens_equal_to_the_pad_are_kept():
    """pad = eos is usual: a genuine eos must survive (methods §2.4 item 6)."""
    assert Batch.from_rows(ROWS, pad_id=0).rows() == ROWS
    assert Batch.from_rows(ROWS, pad_id=8).rows() == ROWS


def test_select_cuts_to_its_longest_row():
    part = Batch.from_rows(ROWS, pad_id=1).select([1, 3])
    assert part.input_ids.tolist() == [[7, 1], [0, 0]]
    assert part.rows() == [ROWS[1], ROWS[3]]


def test_rows_of_one_length_take_one_more_token_each():
    batch = Batch.from_rows([[4, 5, 6], [7, 8, 9]], prompt_lengths=[2, 3])
    longer = batch.followed_by(torch.tensor([1, 2])).followed_by(torch.tensor([3, 0]))
    assert longer.rows() == [[4, 5, 6, 1, 3], [7, 8, 9, 2, 0]]
    assert longer.lengths.tolist() == list(longer.row_lengths) == [5, 5]
    assert longer.prompt_lengths.tolist() == [2, 3]


@pytest.mark.parametrize("max_tokens", [1, 4, 6, 10, 1000])
def test_chunks_partition_rows_within_the_limit(max_tokens):
    batch = Batch.from_rows(ROWS)
    chunks = list(batch.chunks(max_tokens))
    assert sorted(row for chunk in chunks for row in chunk) == [0, 1, 2, 3]
    for chunk in chunks:
        padded = len(chunk) * max(len(ROWS[row]) for row in chunk)
        assert padded <= max_tokens or len(chunk) == 1


def test_to_moves_both_tensors():
    batch = Batch.from_rows(ROWS).to("meta")
    assert batch.input_ids.device == batch.lengths.device == torch.device("meta")


@pytest.mark.parametrize(("rows", "message"), [([], "at least one"), ([[1], []], "row 1")])
def test_empty_input_is_named(rows, message):
    with pytest.raises(TokenizationError, match=message):
        Batch.from_rows(rows)
