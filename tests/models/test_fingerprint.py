from __future__ import annotations

import torch

from rep_fast.models import EditableLM, Site


def test_same_model_same_fingerprint(family, build_lm, tiny_lm):
    assert build_lm(family).fingerprint == tiny_lm.fingerprint
    assert len(tiny_lm.fingerprint) == 64


def test_every_part_enters(build_lm):
    models = {
        "base": build_lm("llama"),
        "weights": build_lm("llama", seed=1),
        "dtype": build_lm("llama", dtype=torch.float64),
        "config": build_lm("llama", rms_norm_eps=1e-5),
        "tokenizer": build_lm("llama", tokenizer="byte_level"),
        "family": build_lm("mistral"),
    }
    assert len({lm.fingerprint for lm in models.values()}) == len(models)


def test_each_weight_enters(build_lm):
    lm = build_lm("gpt2")
    expected = lm.fingerprint
    for name, weight in lm.model.named_parameters():
        middle = weight.data.view(-1)[weight.numel() // 2]
        clean = middle.clone()
        middle += 1
        assert EditableLM(lm.model, lm.tokenizer).fingerprint != expected, name
        middle.copy_(clean)
    assert EditableLM(lm.model, lm.tokenizer).fingerprint == expected


def test_tensors_are_sampled_evenly_to_the_end(build_lm):
    """A tensor above 4096 elements: the sampled ones are i·numel // 4096."""
    clean, first, last = (build_lm("llama") for _ in range(3))
    n = first.head.weight.numel()
    assert n > 4096
    first.head.weight.data.view(-1)[0] += 1
    last.head.weight.data.view(-1)[4095 * n // 4096] += 1
    assert len({lm.fingerprint for lm in (clean, first, last)}) == 3


def test_hooks_and_names_do_not_enter(build_lm, tiny_llama):
    lm = build_lm("llama")
    with lm.patch(Site("value", 0), torch.zeros_like), lm.capture([Site("key", 1)]):
        assert EditableLM(lm.model, lm.tokenizer, name="other").fingerprint == tiny_llama.fingerprint
