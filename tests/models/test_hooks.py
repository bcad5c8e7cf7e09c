from __future__ import annotations

import pytest
import torch

from rep_fast.errors import LayerError
from rep_fast.models import SITE_KINDS, Site
from rep_fast.models.hooks import ForwardStopped, first_tensor, run_until, watch

TEXTS = ["Slovenia is in Europe", "Asia"]


def hook_count(lm):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules())


def sites_of(lm, layer=1):
    return [Site(kind, layer) for kind in SITE_KINDS if kind != "gate" or lm.has_gate]


def test_every_site_is_seen_with_its_width(tiny_lm):
    n, width = tiny_lm.encode(TEXTS).input_ids.shape
    with tiny_lm.capture(sites_of(tiny_lm)) as seen:
        tiny_lm.logits(TEXTS)
    for site in sites_of(tiny_lm):
        columns = 48 if site.kind in ("key", "up", "gate") else 32
        assert seen[site].shape == (n, width, columns), site


def test_residual_stream_is_the_sum_of_its_parts(tiny_lm64):
    """h^l = h^{l−1} + attn + mlp in every family, the parallel GPT-J block included."""
    sites = [Site("hidden", 0), Site("attn_out", 1), Site("value", 1), Site("hidden", 1)]
    with tiny_lm64.capture(sites) as seen:
        tiny_lm64.logits(TEXTS)
    below, attention, mlp, above = (seen[site] for site in sites)
    torch.testing.assert_close(below + attention + mlp, above, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_patch_changes_what_follows_and_undoes_itself(tiny_lm, kind):
    if kind == "gate" and not tiny_lm.has_gate:
        with pytest.raises(LayerError, match="no gate"), tiny_lm.patch(Site(kind, 1), torch.zeros_like):
            pass
        return
    clean, hooks = tiny_lm.logits(TEXTS), hook_count(tiny_lm)
    with tiny_lm.patch(Site(kind, 1), torch.zeros_like), tiny_lm.capture([Site(kind, 1)]) as seen:
        patched = tiny_lm.logits(TEXTS)
    assert not seen[Site(kind, 1)].any()
    assert not torch.allclose(patched, clean)
    assert torch.equal(tiny_lm.logits(TEXTS), clean)
    assert hook_count(tiny_lm) == hooks


def test_patch_of_the_mlp_input_reaches_up_and_gate(tiny_llama):
    with (
        tiny_llama.patch(Site("mlp_in", 0), torch.zeros_like),
        tiny_llama.capture([Site("up", 0), Site("gate", 0)]) as seen,
    ):
        tiny_llama.logits(TEXTS)
    assert not seen[Site("up", 0)].any()
    assert not seen[Site("gate", 0)].any()


def test_patches_nest_in_order(tiny_llama):
    site = Site("value", 1)
    with tiny_llama.patch(site, lambda v: torch.ones_like(v)), tiny_llama.capture([site]) as between:  # noqa: SIM117
        with tiny_llama.patch(site, lambda v: v + 2), tiny_llama.capture([site]) as after:
            tiny_llama.logits(TEXTS)
    assert (between[site] == 1).all()
    assert (after[site] == 3).all()


def test_exceptions_leave_no_hooks(tiny_lm):
    hooks = hook_count(tiny_lm)

    def fail(tensor):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):  # noqa: SIM117
        with tiny_lm.capture(sites_of(tiny_lm)), tiny_lm.patch(Site("key", 2), fail):
            tiny_lm.logits(TEXTS)
    with pytest.raises(RuntimeError, match="inside"), tiny_lm.patch(Site("key", 0), fail):
        tiny_lm.keys(TEXTS, [1])
    assert hook_count(tiny_lm) == hooks
    assert tiny_lm._whole_batch_hooks == 0


def test_capture_of_a_bad_site_leaves_no_hooks(tiny_llama):
    hooks = hook_count(tiny_llama)
    with pytest.raises(LayerError, match="kind 'keys'"), tiny_llama.capture([("key", 0), ("keys", 0)]):
        pass
    with pytest.raises(LayerError, match="layer 9"), tiny_llama.capture([("key", 0), ("key", 9)]):
        pass
    assert hook_count(tiny_llama) == hooks


def test_graph_is_kept_when_grad_is_enabled(tiny_lm64):
    """d logits / d value through a patched leaf equals a finite difference."""
    leaves = []

    def as_leaf(value):
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    site = Site("value", 0)
    with tiny_lm64.patch(site, as_leaf), tiny_lm64.capture([Site("key", 2)]) as seen:
        loss = tiny_lm64.logits(TEXTS)[0, 1].sum()
    (gradient,) = torch.autograd.grad(loss, leaves[0], retain_graph=True)
    assert seen[Site("key", 2)].requires_grad
    step = torch.zeros_like(leaves[0])
    step[0, 0, 3] = 1e-5
    with torch.no_grad():
        moved = []
        for sign in (1, -1):
            with tiny_lm64.patch(site, lambda v, sign=sign: v + sign * step):
                moved.append(tiny_lm64.logits(TEXTS)[0, 1].sum())
    # central difference: error O(step²) with third derivatives of order one
    assert (moved[0] - moved[1]).item() / 2e-5 == pytest.approx(gradient[0, 0, 3].item(), rel=1e-5, abs=1e-7)


def test_no_graph_under_no_grad(tiny_llama):
    with torch.no_grad(), tiny_llama.capture([Site("key", 2)]) as seen:
        tiny_llama.logits(TEXTS)
    assert not seen[Site("key", 2)].requires_grad


def test_captured_at_takes_one_token_per_row(tiny_llama):
    batch = tiny_llama.encode(TEXTS)
    with tiny_llama.capture([Site("key", 1)]) as seen:
        tiny_llama.logits(batch)
    found = seen.at(Site("key", 1), batch.lengths - 1)
    for row, position in enumerate((batch.lengths - 1).tolist()):
        assert torch.equal(found[row], seen[Site("key", 1)][row, position])


def test_what_was_not_captured_is_named(tiny_llama):
    with tiny_llama.capture([Site("key", 1)]) as seen:
        assert Site("key", 1) not in seen
        with pytest.raises(LayerError, match="no forward pass"):
            seen[Site("key", 1)]
        with pytest.raises(LayerError, match="not among"):
            seen[Site("key", 2)]


def test_outer_capture_survives_a_truncated_forward(tiny_lm):
    """The inner pass stops at layer 0: the outer capture sees layer 0 and keeps its own layer 2 for the next pass."""
    with tiny_lm.capture([Site("key", 0), Site("key", 2)]) as seen:
        keys = tiny_lm.keys(TEXTS[:1], [0])[0]
        assert torch.equal(seen[Site("key", 0)][0], keys)
        assert Site("key", 2) not in seen
        tiny_lm.logits(TEXTS)
        assert Site("key", 2) in seen


def test_truncated_forward_computes_nothing_above(tiny_lm):
    reached = []
    hooks = hook_count(tiny_lm)
    for number, block in enumerate(tiny_lm.blocks):
        block.register_forward_hook(lambda *_, number=number: reached.append(number))
    tiny_lm.head.register_forward_hook(lambda *_: reached.append("head"))
    try:
        tiny_lm.keys(TEXTS, [0, 1])
        assert reached == [0]  # block 1 is left in its MLP
        tiny_lm.hidden(tiny_lm.encode(TEXTS), 1)
        assert reached == [0, 0, 1]
    finally:
        for module in (*tiny_lm.blocks, tiny_lm.head):
            module._forward_hooks.popitem()
    assert hook_count(tiny_lm) == hooks


def test_hooks_take_tensors_and_tuples():
    """Older transformers return a tuple from a layer, newer ones a tensor (methods §1, rule d)."""

    class Pair(torch.nn.Module):
        def forward(self, x):
            return x, "rest"

    module, seen = Pair(), []
    with watch(module, lambda tensor: seen.append(tensor) or tensor + 1, at_input=False):
        output = module(torch.zeros(2))
    assert isinstance(output, tuple)
    assert output[1] == "rest"
    assert torch.equal(output[0], torch.ones(2))
    assert torch.equal(first_tensor(output), torch.ones(2))
    assert torch.equal(seen[0], torch.zeros(2))


def test_stop_is_not_an_exception_that_handlers_swallow(tiny_llama):
    assert not issubclass(ForwardStopped, Exception)
    after = []
    run_until(tiny_llama.blocks[0], lambda: after.append(tiny_llama.logits(TEXTS)), at_input=True)
    assert after == []
