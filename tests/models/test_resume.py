"""Resumed forwards equal full forwards with a patch at the value site (T-v-prefix-cache)."""

from __future__ import annotations

import pytest
import torch

from rep_fast.errors import LayerError, PromptError
from rep_fast.models import Batch, Site
from rep_fast.models.resume import EMBEDDINGS

ROWS = [[5, 9, 12, 40, 41, 8, 3], [7, 7, 20], [30, 31, 32, 33, 34], [11]]
STARTS = [2, 0, 4, 0]
AT = [[2, 5, 6], [2], [4], [0]]


def full_logits(lm, batch, layer, delta, at):
    rows = torch.arange(batch.n_rows)

    def add(value):
        changed = value.clone()
        changed[rows, torch.tensor(STARTS)] += delta
        return changed

    with lm.patch(Site("value", layer), add):
        return lm.logits(batch, at=at)


def moved(state, delta):
    hidden = state.hidden.clone()
    hidden[:, 0] += delta
    return hidden


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_resume_equals_full_forward(family, build_lm, layer, attention):
    if family == "gptj" and attention == "sdpa":
        attention = "eager"  # GPT-J has no sdpa path
    lm = build_lm(family, dtype=torch.float64, attention=attention)
    batch = Batch.from_rows(ROWS)
    generator = torch.Generator().manual_seed(layer)
    delta = torch.randn(batch.n_rows, lm.hidden_size, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, lm.vocab_size, generator=generator, dtype=torch.float64)
    expected = full_logits(lm, batch, layer, delta, AT)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), delta)
    state = lm.suffix_state(batch, layer, STARTS)
    found = lm.resume(state, moved(state, delta), at=AT)
    (found * weights).sum().backward()
    # transformers' eager softmax is float32, whose last bits depend on how long the rows are: some roundings a layer
    relative = 1e-10 if attention == "sdpa" else 32 * 2.0**-24
    for own, wanted in ((found.detach(), expected.detach()), (delta.grad, expected_gradient)):
        torch.testing.assert_close(own, wanted, rtol=0, atol=relative * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_resume_respects_sliding_windows(build_lm, family):
    """A window shorter than prefix and suffix; Qwen slides in its upper layers only."""
    window = {"sliding_window": 3} | (
        {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 2}
    )
    lm = build_lm(family, dtype=torch.float64, **window)
    wide = build_lm(family, dtype=torch.float64, sliding_window=None)
    batch = Batch.from_rows(ROWS)
    delta = torch.ones(batch.n_rows, lm.hidden_size, dtype=torch.float64)
    expected = full_logits(lm, batch, 0, delta, AT)
    assert (expected - full_logits(wide, batch, 0, delta, AT)).abs().max() > 1e-3
    state = lm.suffix_state(batch, 0, STARTS)
    torch.testing.assert_close(lm.resume(state, moved(state, delta), at=AT), expected, rtol=1e-10, atol=1e-10)


def test_state_holds_suffix_of_every_row(tiny_lm64):
    batch = Batch.from_rows(ROWS)
    state = tiny_lm64.suffix_state(batch, 1, torch.tensor(STARTS))
    with tiny_lm64.capture([Site("hidden", 1)]) as seen:
        tiny_lm64.logits(batch)
    assert state.hidden.shape == (4, 5, tiny_lm64.hidden_size)
    assert not state.hidden.requires_grad
    for row, (start, ids) in enumerate(zip(STARTS, ROWS, strict=True)):
        real = len(ids) - start
        torch.testing.assert_close(state.hidden[row, :real], seen[Site("hidden", 1)][row, start : len(ids)])
        assert not state.hidden[row, real:].any()
    assert state.lengths.tolist() == [7, 3, 5, 1]
    assert state.n_rows == 4


def test_resume_leaves_weights_without_gradient(build_lm):
    lm = build_lm("llama", dtype=torch.float64)
    lm.model.requires_grad_(True)
    state = lm.suffix_state(Batch.from_rows(ROWS), 0, STARTS)
    hidden = state.hidden.clone().requires_grad_()
    lm.resume(state, hidden, at=AT).sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert all(weight.grad is None and weight.requires_grad for weight in lm.model.parameters())


def test_resume_frees_weights_after_an_exception(build_lm):
    lm = build_lm("gpt2", dtype=torch.float64)
    state = lm.suffix_state(Batch.from_rows(ROWS), 0, STARTS)

    def fail(tensor):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), lm.patch(Site("value", 2), fail):
        lm.resume(state, state.hidden, at=AT)
    assert all(weight.requires_grad for weight in lm.model.parameters())


def test_resume_can_be_called_again(tiny_lm64):
    """Nothing of a call stays behind: the same hidden gives the same bits after another one."""
    state = tiny_lm64.suffix_state(Batch.from_rows(ROWS), 0, STARTS)
    first = tiny_lm64.resume(state, state.hidden, at=AT)
    tiny_lm64.resume(state, state.hidden * 2, at=AT)
    assert torch.equal(tiny_lm64.resume(state, state.hidden, at=AT), first)


def test_hooks_above_the_layer_act(tiny_lm64):
    batch = Batch.from_rows(ROWS)
    state = tiny_lm64.suffix_state(batch, 0, STARTS)
    with tiny_lm64.patch(Site("value", 2), lambda value: value * 3):
        expected = tiny_lm64.logits(batch, at=AT)
        found = tiny_lm64.resume(state, state.hidden, at=AT)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (found - tiny_lm64.resume(state, state.hidden, at=AT)).abs().max() > 1e-3


def test_pads_do_not_matter(tiny_lm64):
    """Each row alone gives what it gives in the ragged batch."""
    state = tiny_lm64.suffix_state(Batch.from_rows(ROWS, pad_id=9), 1, STARTS)
    together = tiny_lm64.resume(state, state.hidden, at=AT).split([3, 1, 1, 1])
    for ids, start, at, expected in zip(ROWS, STARTS, AT, together, strict=True):
        alone = tiny_lm64.suffix_state(Batch.from_rows([ids]), 1, [start])
        torch.testing.assert_close(tiny_lm64.resume(alone, alone.hidden, at=[at]), expected, rtol=1e-10, atol=1e-10)


def test_resume_from_the_embeddings(tiny_lm64):
    """Layer −1: the stream entering layer 0, so that hooks of every layer act on the suffix."""
    batch = Batch.from_rows(ROWS)
    generator = torch.Generator().manual_seed(5)
    delta = torch.randn(batch.n_rows, tiny_lm64.hidden_size, generator=generator, dtype=torch.float64)
    expected = full_logits(tiny_lm64, batch, 0, delta, AT)
    state = tiny_lm64.suffix_state(batch, EMBEDDINGS, STARTS)

    def add(value):
        changed = value.clone()
        changed[:, 0] += delta
        return changed

    with tiny_lm64.patch(Site("value", 0), add):
        found = tiny_lm64.resume(state, state.hidden, at=AT)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("read_layers", [[0, 0, 0, 0], [1, 2, 0, 2], [2, 2, 2, 2]])
def test_rows_are_read_after_the_layers_asked_for(tiny_lm64, read_layers):
    batch = Batch.from_rows(ROWS)
    state = tiny_lm64.suffix_state(batch, 0, STARTS)
    sites = [Site("hidden", layer) for layer in range(3)]
    with tiny_lm64.capture(sites) as seen:
        tiny_lm64.logits(batch)
    streams = [
        seen[sites[layer]][row, at] for row, (layer, positions) in enumerate(zip(read_layers, AT, strict=True))
        for at in positions
    ]  # fmt: skip
    expected = tiny_lm64.head(tiny_lm64.final_norm(torch.stack(streams)))
    found = tiny_lm64.resume(state, state.hidden, at=AT, read_layers=read_layers)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [[2, 0], [3], [0, 1, 2, 3]])
def test_a_selection_gives_what_the_whole_gives(tiny_lm64, rows):
    state = tiny_lm64.suffix_state(Batch.from_rows(ROWS), 0, STARTS)
    whole = tiny_lm64.resume(state, state.hidden, at=AT).split([len(at) for at in AT])
    part = state.select(rows)
    found = tiny_lm64.resume(part, part.hidden, at=[AT[row] for row in rows])
    torch.testing.assert_close(found, torch.cat([whole[row] for row in rows]), rtol=1e-10, atol=1e-10)


def test_layers_that_cannot_be_read_are_named(tiny_llama64):
    state = tiny_llama64.suffix_state(Batch.from_rows(ROWS), 1, STARTS)
    with pytest.raises(LayerError, match="layer 0 lies below layer 1"):
        tiny_llama64.resume(state, state.hidden, at=AT, read_layers=[2, 2, 0, 2])
    with pytest.raises(LayerError, match="layer 3"):
        tiny_llama64.resume(state, state.hidden, at=AT, read_layers=[3] * 4)
    with pytest.raises(PromptError, match="2 rows, the state has 4"):
        tiny_llama64.resume(state, state.hidden, at=AT, read_layers=[2, 2])


@pytest.mark.parametrize(
    ("starts", "message"), [([0, 3, 0, 0], "start 3 of row 1"), ([-1, 0, 0, 0], "start -1"), ([0, 0], "2 starts")]
)
def test_starts_outside_rows_are_named(tiny_llama64, starts, message):
    with pytest.raises(PromptError, match=message):
        tiny_llama64.suffix_state(Batch.from_rows(ROWS), 0, starts)


@pytest.mark.parametrize(
    ("at", "message"),
    [([[1], [2], [4], [0]], "position 1 of row 0"), ([[7], [], [], []], "position 7"), ([[2]], "1 rows")],
)
def test_positions_outside_suffixes_are_named(tiny_llama64, at, message):
    state = tiny_llama64.suffix_state(Batch.from_rows(ROWS), 0, STARTS)
    with pytest.raises(PromptError, match=message):
        tiny_llama64.resume(state, state.hidden, at=at)


def test_wrong_shape_and_layer_are_named(tiny_llama64):
    state = tiny_llama64.suffix_state(Batch.from_rows(ROWS), 0, STARTS)
    with pytest.raises(LayerError, match="shape"):
        tiny_llama64.resume(state, state.hidden[:2], at=AT)
    with pytest.raises(LayerError, match="layer 3"):
        tiny_llama64.suffix_state(Batch.from_rows(ROWS), 3, STARTS)


def test_attention_without_explicit_mask_is_refused(build_lm):
    lm = build_lm("llama")
    lm.config._attn_implementation = "flex_attention"
    with pytest.raises(LayerError, match="sdpa"):
        lm.suffix_state(Batch.from_rows(ROWS), 0, STARTS)
