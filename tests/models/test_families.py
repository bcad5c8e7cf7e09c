from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import transformers

from rep_fast.errors import LayerError, UnknownFamilyError
from rep_fast.models import FAMILIES, EditableLM, Layout
from rep_fast.models.families import attention_window, layout_for


def test_unknown_type_says_what_an_entry_needs():
    with pytest.raises(UnknownFamilyError) as caught:
        layout_for("bloom")
    assert "'bloom'" in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)
    assert all(field.name in str(caught.value) for field in fields(Layout))


def test_layout_of_a_user_opens_an_unknown_family(build_lm):
    """A Phi model, unlisted: its plain MLP and parallel block need only module paths."""
    tokenizer = build_lm("gpt2").tokenizer
    config = transformers.PhiConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.PhiForCausalLM(config)
    with pytest.raises(UnknownFamilyError, match="phi"):
        EditableLM(model, tokenizer)
    layout = replace(
        FAMILIES["llama"],
        family="phi",
        norm="model.final_layernorm",
        down="mlp.fc2",
        up="mlp.fc1",
        gate=None,
        attn_out="self_attn.dense",
    )
    lm = EditableLM(model, tokenizer, layout=layout)
    assert lm.keys(["Slovenia"], [1])[1].shape[1] == 48
    batch = lm.encode(["Slovenia is in Europe", "Asia"])
    state = lm.suffix_state(batch, 0, [1, 0])
    last = [[int(position)] for position in batch.lengths - 1]
    torch.testing.assert_close(lm.resume(state, state.hidden, at=last), lm.logits(batch, at=last))


def test_layout_with_a_wrong_path_is_named(build_lm):
    lm = build_lm("llama")
    with pytest.raises(LayerError, match=r"model\.ln_f"):
        EditableLM(lm.model, lm.tokenizer, layout=replace(FAMILIES["llama"], norm="model.ln_f"))
    broken = EditableLM(lm.model, lm.tokenizer, layout=replace(FAMILIES["llama"], down="mlp.c_proj"))
    with pytest.raises(LayerError, match=r"mlp\.c_proj"):
        broken.down_proj(0)


def test_windows_by_layer():
    qwen = transformers.Qwen2Config(use_sliding_window=True, sliding_window=7, max_window_layers=1, num_hidden_layers=3)
    assert [attention_window(qwen, layer) for layer in range(3)] == [None, 7, 7]
    assert attention_window(transformers.MistralConfig(sliding_window=5), 0) == 5
    assert attention_window(transformers.LlamaConfig(), 0) is None
