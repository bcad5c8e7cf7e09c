"""What hooks are told: where prompts end, in whole passes, in pieces of them, and step by step in a generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rep_fast.errors import LayerError, PromptError
from rep_fast.models import Batch, EditableLM, ForwardPass, Site

ROWS = [[5, 9, 30], [7], [8, 6, 31, 40, 2]]


def passes_during(lm: EditableLM, run: Any) -> list[ForwardPass]:
    """The context announced at each forward through layer 1."""
    seen: list[ForwardPass] = []

    def note(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(lm.forward_pass)
        return hidden

    with lm.patch(Site("hidden", 1), note, per_token=True):
        run()
    return seen


def test_masks_of_prompts_and_their_ends() -> None:
    told = ForwardPass.of(Batch.from_rows(ROWS, prompt_lengths=[2, 1, 4]))
    assert told.is_prompt(5).tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert told.is_prompt_end(5).tolist() == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]
    later = ForwardPass(told.prompt_lengths, begin=3)
    assert later.is_prompt(2).tolist() == [[0, 0], [0, 0], [1, 0]]
    assert later.is_prompt_end(2).tolist() == [[0, 0], [0, 0], [1, 0]]


def test_rows_without_prompt_length_are_all_prompt(tiny_lm: EditableLM) -> None:
    (told,) = passes_during(tiny_lm, lambda: tiny_lm.logits(ROWS))
    assert told.prompt_lengths.tolist() == [3, 1, 5]
    assert told.begins


def test_prompt_lengths_follow_their_rows_through_pieces(tiny_llama: EditableLM) -> None:
    batch = tiny_llama.encode(ROWS, prompt_lengths=[2, 1, 4])
    at = [[length - 1] for length in batch.lengths.tolist()]
    told = passes_during(tiny_llama, lambda: tiny_llama.logits(batch, at=at, max_tokens=5))
    # pieces go from long rows to short ones
    assert [one.prompt_lengths.tolist() for one in told] == [[4], [2], [1]]


def test_generation_tells_one_prompt_and_one_memory_to_all_steps(tiny_lm: EditableLM) -> None:
    told = passes_during(tiny_lm, lambda: tiny_lm.generate_ids(ROWS[2], max_new_tokens=3))
    assert [one.begin for one in told] == [0, 5, 6]
    assert [one.begins for one in told] == [True, False, False]
    assert all(one.prompt_lengths.tolist() == [5] and one.kept is told[0].kept for one in told)
    (other,) = passes_during(tiny_lm, lambda: tiny_lm.generate_ids(ROWS[0], max_new_tokens=1))
    assert other.kept is not told[0].kept


def test_nothing_is_told_outside_of_a_pass(tiny_llama: EditableLM) -> None:
    passes_during(tiny_llama, lambda: tiny_llama.read(ROWS, [("key", 1)]))
    with pytest.raises(LayerError, match="which a resumed forward or a bare call of the model does not show; undo"):
        tiny_llama.forward_pass  # noqa: B018 - the property is what raises


def test_prompt_lengths_that_fit_no_row(tiny_llama: EditableLM) -> None:
    with pytest.raises(PromptError, match="2 prompt lengths were given for 3 rows"):
        tiny_llama.encode(ROWS, prompt_lengths=[1, 1])
    for length in (0, 4):
        with pytest.raises(PromptError, match=f"prompt of row 0 cannot have {length} of its 3 tokens"):
            tiny_llama.encode(ROWS, prompt_lengths=[length, 1, 1])
