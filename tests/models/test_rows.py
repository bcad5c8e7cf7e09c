"""Rows carried through the model piece by piece read what one full forward reads, edits of lower layers included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rep_fast.errors import LayerError
from rep_fast.models import Batch, EditableLM, Site, advance, enter_layer, read_rows

ROWS = [[5, 9, 12, 40, 41, 8, 3], [7, 7, 20], [30, 31, 32, 33, 34], [11]]
SITES = [Site("key", 1), Site("key", 2), Site("value", 2), Site("hidden", 2)]


def real(tensor: Tensor, batch: Batch) -> Tensor:
    return tensor[batch.is_real]


def assert_same(found: Any, wanted: Any, batch: Batch) -> None:
    for site, tensor in found.items():
        torch.testing.assert_close(real(tensor, batch), real(wanted[site], batch), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1])
def test_reading_equals_the_full_forward(family: str, build_lm: Any, layer: int, attention: str) -> None:
    lm = build_lm(family, dtype=torch.float64, attention="eager" if family == "gptj" else attention)
    batch = Batch.from_rows(ROWS)
    found = read_rows(lm, enter_layer(lm, batch, layer), SITES)
    assert set(found) == set(SITES)
    assert_same(found, lm.read(batch, SITES), batch)


def test_going_on_sees_what_was_changed_in_between(tiny_lm64: EditableLM) -> None:
    """A state that entered layer 1 before that layer was edited goes on through the edited layer."""
    lm, batch = tiny_lm64, Batch.from_rows(ROWS)
    state = enter_layer(lm, batch, 1)
    unedited = read_rows(lm, state, [Site("key", 2)])[Site("key", 2)]
    with lm.patch(Site("value", 1), lambda value: 3 * value):
        wanted = lm.read(batch, SITES[1:])
        later = advance(lm, state, 2)
        assert later.layer == 2
        assert_same(read_rows(lm, later, SITES[1:]), wanted, batch)
    assert float((unedited - wanted[Site("key", 2)]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_sliding_windows_hold(build_lm: Any, family: str) -> None:
    window = {"sliding_window": 3} | (
        {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 1}
    )
    lm = build_lm(family, dtype=torch.float64, **window)
    batch = Batch.from_rows(ROWS)
    found, wanted = read_rows(lm, enter_layer(lm, batch, 0), SITES), lm.read(batch, SITES)
    assert_same(found, wanted, batch)
    wide = build_lm(family, dtype=torch.float64, sliding_window=None).read(batch, SITES)
    assert float((wide[SITES[1]] - wanted[SITES[1]]).abs().max()) > 1e-3


def test_nothing_behind_what_is_read_is_run(tiny_llama64: EditableLM) -> None:
    state = enter_layer(tiny_llama64, Batch.from_rows(ROWS), 1)

    def fail(_: Tensor) -> Tensor:
        raise AssertionError("a later site was reached")

    with tiny_llama64.patch(Site("value", 1), fail):
        read_rows(tiny_llama64, state, [Site("key", 1)])


def test_no_graph_is_kept(tiny_llama64: EditableLM) -> None:
    state = enter_layer(tiny_llama64, Batch.from_rows(ROWS), 1)
    assert not state.hidden.requires_grad
    assert not advance(tiny_llama64, state, 2).hidden.requires_grad


def test_layers_out_of_reach_are_named(tiny_llama64: EditableLM, build_lm: Any) -> None:
    state = enter_layer(tiny_llama64, Batch.from_rows(ROWS), 1)
    with pytest.raises(LayerError, match="lies below layer 1"):
        read_rows(tiny_llama64, state, [Site("key", 0)])
    with pytest.raises(LayerError, match="reached layer 1; enter layer 0"):
        advance(tiny_llama64, state, 0)
    with pytest.raises(LayerError, match="layer 3"):
        enter_layer(tiny_llama64, Batch.from_rows(ROWS), 3)
    lm = build_lm("llama")
    lm.config._attn_implementation = "flex_attention"
    with pytest.raises(LayerError, match="sdpa"):
        enter_layer(lm, Batch.from_rows(ROWS), 0)
