from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rep_fast.errors import LayerError
from rep_fast.models import Site


def test_sizes_come_from_config_and_weight(tiny_lm):
    assert tiny_lm.n_layers == 3
    assert tiny_lm.hidden_size == 32
    assert [tiny_lm.key_width(layer) for layer in range(3)] == [48, 48, 48]
    assert tiny_lm.device == torch.device("cpu")
    assert tiny_lm.dtype == torch.float32


def test_down_projection_maps_keys_to_values(tiny_lm64):
    """m = W k + b with W [D, M] whatever the stored order."""
    with tiny_lm64.capture([Site("key", 1), Site("value", 1)]) as seen:
        tiny_lm64.logits(["Slovenia is in Europe"])
    bias = tiny_lm64.down_bias(1)
    value = seen[Site("key", 1)] @ tiny_lm64.down_weight(1).T + (0 if bias is None else bias)
    torch.testing.assert_close(value, seen[Site("value", 1)], rtol=1e-12, atol=1e-12)


def test_up_and_gate_map_the_mlp_input_to_the_key(tiny_lm64):
    """k = act(x W_in + b), or silu(x W_gate) ⊙ (x W_up)."""
    sites = [Site("mlp_in", 2), Site("up", 2), Site("key", 2)]
    with tiny_lm64.capture(sites) as seen:
        tiny_lm64.logits(["Slovenia is in Europe"])
    x, up, key = (seen[site] for site in sites)
    bias = getattr(tiny_lm64.blocks[2].get_submodule(tiny_lm64.layout.up), "bias", None)
    torch.testing.assert_close(x @ tiny_lm64.up_weight(2).T + (0 if bias is None else bias), up)
    if not tiny_lm64.has_gate:
        torch.testing.assert_close(nn.functional.gelu(up, approximate="tanh"), key)
        with pytest.raises(LayerError, match="no gate"):
            tiny_lm64.gate_weight(2)
        return
    torch.testing.assert_close(nn.functional.silu(x @ tiny_lm64.gate_weight(2).T) * up, key)


def test_weights_are_views_of_the_model(fresh_lm):
    before = fresh_lm.logits(["Asia"])
    fresh_lm.down_weight(1).data.mul_(2)
    assert not torch.equal(fresh_lm.logits(["Asia"]), before)


def test_transposition_is_decided_by_type_when_square(build_lm):
    """With D = M the shape cannot tell (methods §1, rule a)."""
    lm = build_lm("gpt2", n_inner=32)
    assert isinstance(lm.down_proj(0), Conv1D)
    assert torch.equal(lm.down_weight(0), lm.down_proj(0).weight.T)
    llama = build_lm("llama", intermediate_size=32)
    assert torch.equal(llama.down_weight(0), llama.down_proj(0).weight)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layer_outside_is_named(tiny_lm, layer):
    with pytest.raises(LayerError, match=f"layer {layer} .* 0 to 2"):
        tiny_lm.down_weight(layer)


def test_other_modules_are_refused(build_lm):
    lm = build_lm("llama")
    lm.blocks[0].mlp.down_proj = nn.Sequential(lm.blocks[0].mlp.down_proj)
    with pytest.raises(LayerError, match="Sequential"):
        lm.down_weight(0)
    with pytest.raises(LayerError, match="Sequential"):
        lm.key_width(0)


def test_quantised_weights_are_refused(build_lm):
    lm = build_lm("llama")
    down = lm.blocks[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(LayerError, match=r"torch\.int8"):
        lm.down_weight(0)


def test_rotary_only_where_the_family_has_it(tiny_llama, tiny_gpt2):
    hidden, positions = torch.zeros(1, 2, 32), torch.tensor([[3, 4]])
    assert tiny_gpt2.rotary(hidden, positions) is None
    cos, sin = tiny_llama.rotary(hidden, positions)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
