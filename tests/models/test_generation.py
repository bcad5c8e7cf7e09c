from __future__ import annotations

import pytest
import torch

from rep_fast.errors import HparamError, TokenizationError
from rep_fast.models import Site

PROMPT = [5, 9, 30, 31, 32]


def greedy_without_cache(lm, ids, steps):
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(lm.logits([ids], at=[[len(ids) - 1]])[0].argmax()))
        if ids[-1] in lm.eos_token_ids:
            break
    return tuple(ids)


def test_cache_gives_what_whole_forwards_give(tiny_lm64):
    assert tiny_lm64.generate_ids(PROMPT, max_new_tokens=8) == greedy_without_cache(tiny_lm64, PROMPT, 8)


def test_cache_respects_sliding_windows(build_lm):
    lm = build_lm("mistral", dtype=torch.float64, sliding_window=3)
    assert lm.generate_ids(PROMPT, max_new_tokens=8) == greedy_without_cache(lm, PROMPT, 8)


def test_text_starts_with_the_prompt(tiny_lm):
    text = tiny_lm.generate("Slovenia is in", max_new_tokens=3)
    assert text.startswith("Slovenia is in")
    assert tiny_lm.generate("Slovenia is in", max_new_tokens=0) == "Slovenia is in"


def test_generation_passes_through_hooks(tiny_lm):
    plain = tiny_lm.generate_ids(PROMPT, max_new_tokens=4)
    wanted = torch.nn.functional.normalize(tiny_lm.model.get_output_embeddings().weight[77].detach(), dim=0)
    last = Site("hidden", 2)
    with tiny_lm.patch(last, lambda hidden: hidden * 0 + 50 * wanted):
        patched = tiny_lm.generate_ids(PROMPT, max_new_tokens=4)
    assert len(set(patched[5:])) == 1
    assert patched != plain
    assert tiny_lm.generate_ids(PROMPT, max_new_tokens=4) == plain


def test_stops_after_the_end_token(build_lm):
    lm = build_lm("llama")
    ids = lm.generate_ids(PROMPT, max_new_tokens=6)
    lm.config.eos_token_id = [399, ids[6]]
    stopped = lm.generate_ids(PROMPT, max_new_tokens=6)
    assert stopped == ids[: ids.index(ids[6], 5) + 1]


def test_sampling_repeats_with_its_seed(tiny_llama):
    drawn = [tiny_llama.generate_ids(PROMPT, max_new_tokens=12, top_k=5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sampling_stays_within_the_best(tiny_llama):
    ids = list(tiny_llama.generate_ids(PROMPT, max_new_tokens=10, top_k=3, seed=2))
    for position in range(len(PROMPT), len(ids)):
        best = tiny_llama.logits([ids[:position]], at=[[position - 1]])[0].topk(3).indices
        assert ids[position] in best.tolist()
    assert tiny_llama.generate_ids(PROMPT, top_k=1, seed=0) == tiny_llama.generate_ids(PROMPT)
    assert len(tiny_llama.generate_ids(PROMPT, max_new_tokens=1, top_k=10_000)) == 6


def test_global_random_state_is_left_alone(tiny_llama):
    before = torch.get_rng_state()
    tiny_llama.generate(PROMPT, max_new_tokens=2, top_k=2, seed=4)
    tiny_llama.generate(PROMPT, max_new_tokens=2, top_k=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_settings_are_named(tiny_gpt2):
    with pytest.raises(HparamError, match="top_k is 0"):
        tiny_gpt2.generate(PROMPT, top_k=0)
    with pytest.raises(HparamError, match="max_new_tokens is -1"):
        tiny_gpt2.generate(PROMPT, max_new_tokens=-1)
    with pytest.raises(TokenizationError, match="256 positions"):
        tiny_gpt2.generate(PROMPT, max_new_tokens=300)
