from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import processors

from rep_fast.errors import FingerprintError, LayerError, OutputError, PromptError, TokenizationError
from rep_fast.models import Batch, EditableLM, Site

TEXTS = [
    "Slovenia is in Europe",
    "Asia",
    "The Eiffel Tower is located in the city of Paris.",
    "Kobe Bryant plays basketball in Los Angeles.",
    "Asia is a continent",
]
# fp32 sums of different batch shapes differ in their order only
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_forward_is_that_of_the_model(tiny_lm):
    """Same logits as the plain Hugging Face call on each text alone."""
    batch = tiny_lm.encode(TEXTS)
    logits = tiny_lm.logits(batch)
    for row, ids in enumerate(batch.rows()):
        expected = tiny_lm.model(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits[row, : len(ids)], expected, **CLOSE)


def test_logits_at_positions_are_rows_of_the_whole(tiny_lm64):
    batch = tiny_lm64.encode(TEXTS)
    at = [[0, length - 1] if row % 2 else [] for row, length in enumerate(batch.lengths.tolist())]
    expected = torch.cat([tiny_lm64.logits(batch)[row, positions] for row, positions in enumerate(at)])
    torch.testing.assert_close(tiny_lm64.logits(batch, at=at), expected, rtol=1e-12, atol=1e-12)


def test_head_runs_on_wanted_positions_only(build_lm):
    lm = build_lm("llama")
    seen = []
    lm.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    lm.logits(TEXTS, at=[[0]] * 5)
    lm.keys(TEXTS, [2])
    assert seen == [5]


@pytest.mark.parametrize("max_tokens", [1, 20, 45])
def test_pieces_give_the_same_in_the_same_order(tiny_lm64, max_tokens):
    batch = tiny_lm64.encode(TEXTS)
    close = {"rtol": 1e-10, "atol": 1e-10}
    last = (batch.lengths - 1)[:, None].tolist()
    torch.testing.assert_close(
        tiny_lm64.logits(batch, at=last, max_tokens=max_tokens), tiny_lm64.logits(batch, at=last), **close
    )
    whole, pieces = tiny_lm64.logits(batch), tiny_lm64.logits(batch, max_tokens=max_tokens)
    torch.testing.assert_close(pieces[batch.is_real], whole[batch.is_real], **close)
    for positions in (None, batch.lengths - 1):
        found = tiny_lm64.keys(batch, [0, 2], positions=positions, max_tokens=max_tokens)
        for layer, expected in tiny_lm64.keys(batch, [0, 2], positions=positions).items():
            torch.testing.assert_close(found[layer], expected, **close)


def test_captures_and_whole_batch_patches_see_one_pass(tiny_llama):
    batch = tiny_llama.encode(TEXTS)
    with tiny_llama.capture([Site("key", 0)]) as seen:
        tiny_llama.logits(batch, max_tokens=1)
    assert seen[Site("key", 0)].shape[0] == len(TEXTS)
    shapes = []
    for per_token in (False, True):
        with tiny_llama.patch(Site("key", 0), lambda k: shapes.append(k.shape[0]) or k, per_token=per_token):
            tiny_llama.logits(batch, at=[[0]] * 5, max_tokens=1)
    assert shapes == [5, 1, 1, 1, 1, 1]


def test_keys_are_those_of_a_full_forward(tiny_lm64):
    batch = tiny_lm64.encode(TEXTS)
    sites = [Site("key", layer) for layer in range(3)]
    with tiny_lm64.capture(sites) as seen:
        tiny_lm64.logits(batch)
    positions = batch.lengths // 2
    found = tiny_lm64.keys(batch, [2, 0], positions=positions.tolist())
    every = tiny_lm64.keys(TEXTS, [0, 1])
    assert list(found) == [2, 0]
    assert found[0].dtype == torch.float64
    assert not found[0].requires_grad
    for layer in (2, 0):
        torch.testing.assert_close(found[layer], seen.at(Site("key", layer), positions))
    for layer in (0, 1):
        assert every[layer].shape == (batch.n_tokens, 48)
        torch.testing.assert_close(every[layer], seen[Site("key", layer)][batch.is_real])


def test_keys_of_half_precision_models_are_float32(build_lm):
    lm = build_lm("llama", dtype=torch.bfloat16)
    assert lm.keys(["Asia"], 1)[1].dtype == torch.float32


def test_hidden_and_read_stop_at_their_layer(tiny_lm64):
    batch = tiny_lm64.encode(TEXTS)
    with tiny_lm64.capture([Site("hidden", 1), Site("value", 1), Site("attn_out", 0)]) as seen:
        tiny_lm64.logits(batch)
    torch.testing.assert_close(tiny_lm64.hidden(batch, 1), seen[Site("hidden", 1)])
    found = tiny_lm64.read(batch, [Site("value", 1), ("attn_out", 0)])
    torch.testing.assert_close(found[Site("value", 1)], seen[Site("value", 1)])
    torch.testing.assert_close(found[Site("attn_out", 0)], seen[Site("attn_out", 0)])


def test_encode_takes_texts_and_ids(tiny_llama):
    texts = tiny_llama.encode(["Asia", "Europe is"])
    bos = tiny_llama.tokenizer.bos_token_id
    assert all(row[0] == bos for row in texts.rows())
    mixed = tiny_llama.encode(["Asia", [5, 6]])
    assert mixed.rows() == [texts.rows()[0], [5, 6]]
    assert tiny_llama.encode("Asia").rows() == [texts.rows()[0]]


def test_encode_refuses_what_the_model_cannot_read(build_lm):
    lm = build_lm("gpt2")
    with pytest.raises(TokenizationError, match="row 0"):
        lm.encode([""])
    with pytest.raises(TokenizationError, match="id 400 in text 1"):
        lm.encode(["Asia", [400]])
    with pytest.raises(TokenizationError, match="256 positions"):
        lm.encode([[1] * 257])
    with pytest.raises(TokenizationError, match="256 positions"):
        lm.logits(Batch.from_rows([[1] * 257]))


def test_positions_outside_rows_are_named(tiny_llama):
    batch = tiny_llama.encode(TEXTS[:2])
    with pytest.raises(PromptError, match="position 9 of row 1"):
        tiny_llama.logits(batch, at=[[0], [9]])
    with pytest.raises(PromptError, match="1 rows"):
        tiny_llama.logits(batch, at=[[0]])
    with pytest.raises(PromptError, match="position -1"):
        tiny_llama.keys(batch, [0], positions=[-1, 0])
    with pytest.raises(LayerError, match="at least one"):
        tiny_llama.keys(batch, [])
    with pytest.raises(LayerError, match="layer 7"):
        tiny_llama.keys(batch, [0, 7])


def test_locate_and_answer_use_the_models_tokenizer(tiny_llama):
    found = tiny_llama.locate("{} is in Europe", "Slovenia")
    assert tiny_llama.decode(found.ids[: found.position + 1]) == "Slovenia"
    target = tiny_llama.answer("Slovenia is in", "Asia")
    assert tiny_llama.decode(target.target_ids) == " Asia"


def test_tokenizer_that_closes_texts_is_refused(build_lm):
    lm = build_lm("llama")
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    with pytest.raises(TokenizationError, match="add_eos_token=False"):
        EditableLM(lm.model, tokenizer)


def test_pad_falls_back_to_eos_then_zero(build_lm):
    lm = build_lm("llama")
    assert lm.tokenizer.pad_token_id is None
    assert lm.pad_id == lm.tokenizer.eos_token_id
    assert build_lm("llama", tokenizer="slow").pad_id == 2


def test_model_runs_in_eval_mode(build_lm):
    lm = build_lm("gpt2", resid_pdrop=0.5)
    lm.model.train()
    lm = EditableLM(lm.model, lm.tokenizer)
    assert torch.equal(lm.logits(["Asia"]), lm.logits(["Asia"]))


def test_fingerprint_is_taken_from_clean_weights(build_lm):
    lm = build_lm("llama")
    lm.active_edits.append("edit")
    with pytest.raises(FingerprintError, match="undo them first"):
        _ = lm.fingerprint
    lm.active_edits.clear()
    clean = lm.fingerprint
    lm.active_edits.append("edit")
    lm.down_weight(0).data.add_(1)
    assert lm.fingerprint == clean


def test_save_needs_a_directory(tiny_llama, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="another directory"):
        tiny_llama.save_pretrained(blocked / "inside")
