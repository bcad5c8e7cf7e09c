"""v*: the fast optimisation follows the definition, on every model family."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rep_fast.editors import ValueHparams, optimise_value
from rep_fast.editors.plain_value import optimise_value_plainly
from rep_fast.editors.value import edit_texts, optimise_delta
from rep_fast.errors import NothingToEditError, TokenizationError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}")
# random weights never fall below the early stop; a few steps are enough to see every term at work
HPARAMS = ValueHparams(v_steps=6, early_stop=None, v_weight_decay=0.5)


def test_trajectory_equals_the_definition(tiny_lm64: EditableLM) -> None:
    """T-v-prefix-cache: same δ after every step as with full forwards and a hook."""
    fast = optimise_value(tiny_lm64, FACT, layer=1, templates=TEMPLATES, hparams=HPARAMS)
    plain = optimise_value_plainly(tiny_lm64, FACT, layer=1, templates=TEMPLATES, hparams=HPARAMS)
    assert len(fast.losses) == HPARAMS.v_steps
    scale = plain.deltas.norm(dim=1).clamp_min(1e-30)
    assert float(((fast.deltas - plain.deltas).norm(dim=1) / scale).max()) <= 1e-9
    torch.testing.assert_close(fast.losses, plain.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(fast.keys, plain.keys, rtol=1e-12, atol=1e-12)


def test_subject_at_the_end_of_the_prompt(tiny_llama64: EditableLM) -> None:
    fact = Fact("The continent of Europe holds {}", "Slovenia", "Paris")
    fast = optimise_value(tiny_llama64, fact, layer=0, templates=TEMPLATES, hparams=HPARAMS)
    plain = optimise_value_plainly(tiny_llama64, fact, layer=0, templates=TEMPLATES, hparams=HPARAMS)
    torch.testing.assert_close(fast.v_star, plain.v_star, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", ["Paris", "Los Angeles"])
@pytest.mark.parametrize("prompt", ["The continent of Europe holds {}", "{}"])
def test_standalone_targets_of_every_tokenizer(build_lm: Any, tokenizer_kind: str, prompt: str, target: str) -> None:
    """The subject may end the prompt: where a blank is always prepended, the first target is read before it."""
    lm = build_lm("llama", tokenizer=tokenizer_kind, dtype=torch.float64)
    settings = {"layer": 0, "templates": TEMPLATES, "hparams": HPARAMS, "target_tok": "standalone"}
    fact = Fact(prompt, "Slovenia", target)
    fast, plain = optimise_value(lm, fact, **settings), optimise_value_plainly(lm, fact, **settings)
    torch.testing.assert_close(fast.deltas, plain.deltas, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast.losses, plain.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(fast.keys, plain.keys, rtol=1e-12, atol=1e-12)
    texts = edit_texts(lm, fact, TEMPLATES, target_tok="standalone")
    assert (texts.answer_at[0][0] < texts.lookup[0]) == (tokenizer_kind == "metaspace_always")


@pytest.mark.parametrize("target", ["ica is", "ica is in"])
def test_a_standalone_target_that_swallows_the_subject_is_refused(build_lm: Any, target: str) -> None:
    """decode(["▁", "ica"]) has no leading blank: "Antarct" and "ica" become one token, one fewer before the target.

    The longer target puts another token where the subject's last one stood.
    """
    lm = build_lm("llama", tokenizer="metaspace_first")
    fact = Fact("They went to {}", "Antarct", target)
    edit_texts(lm, fact, ("{}",))
    with pytest.raises(TokenizationError, match=f"'{target}' runs together with subject 'Antarct'"):
        edit_texts(lm, fact, ("{}",), target_tok="standalone")


def test_no_gradient_reaches_the_weights(build_lm: Any) -> None:
    lm = build_lm("llama")
    lm.model.requires_grad_(True)
    optimise_value(lm, FACT, layer=1, templates=TEMPLATES, hparams=HPARAMS)
    assert all(weight.grad is None for weight in lm.model.parameters())


def test_delta_stays_inside_the_clamp(tiny_llama64: EditableLM) -> None:
    hparams = dataclasses.replace(HPARAMS, clamp_norm_factor=0.25, v_lr=5.0)
    found = optimise_value(tiny_llama64, FACT, layer=1, templates=TEMPLATES, hparams=hparams)
    bound = 0.25 * float(found.v_0.norm())
    assert float(found.deltas.norm(dim=1).max()) <= bound * (1 + 1e-12)
    assert float(found.deltas[-1].norm()) >= 0.99 * bound


def test_early_stop_comes_before_the_update(tiny_llama64: EditableLM) -> None:
    hparams = dataclasses.replace(HPARAMS, early_stop=1e9)
    found = optimise_value(tiny_llama64, FACT, layer=1, templates=TEMPLATES, hparams=hparams)
    assert len(found.losses) == 1
    assert torch.equal(found.v_star, found.v_0)


def test_kl_is_the_expectation_under_the_current_distribution(tiny_llama64: EditableLM) -> None:
    """T-kl-dir: Σ p_δ (log p_δ − log p_0), seen through the loss of a made-up model."""
    texts = edit_texts(tiny_llama64, FACT, ("{}",))
    n_targets, vocabulary = texts.target_ids.shape[1], 11
    texts = dataclasses.replace(texts, target_ids=texts.target_ids % vocabulary)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n_targets + 1, vocabulary, generator=generator, dtype=torch.float64)
    base[torch.arange(n_targets), texts.target_ids[0]] -= 10
    map_ = torch.randn(4, vocabulary, generator=generator, dtype=torch.float64)
    v_0 = torch.ones(4, dtype=torch.float64)
    hparams = ValueHparams(v_steps=2, v_lr=0.3, kl_factor=0.7, v_weight_decay=0.2, early_stop=None)
    deltas, losses = optimise_delta(lambda delta: base + delta @ map_, texts, v_0, hparams, FACT)

    log_p, log_p_0 = (base + deltas[1] @ map_).log_softmax(-1), base.log_softmax(-1)
    nll = -log_p[torch.arange(n_targets), texts.target_ids[0]].mean()
    kl = (log_p[-1].exp() * (log_p[-1] - log_p_0[-1])).sum()
    wanted = nll + 0.7 * kl + 0.2 * deltas[1].norm() / v_0.norm() ** 2
    assert losses[1] == pytest.approx(float(wanted), rel=1e-9)


def said_already(lm: EditableLM) -> Fact:
    """A fact whose target is the model's own answer: the first prompt answered by a token that reads back as itself."""
    for subject in ("Slovenia", "Europe", "Paris", "Kobe Bryant", "Michael Jordan", "Asia", "Africa", "Windows"):
        for prompt in ("{} is", "{} belongs to", "The city of {} is in", "I think that {}", "{} plays", "{} and"):
            text = prompt.replace("{}", subject)
            answer = lm.generate(text, max_new_tokens=1)[len(text) :].strip()
            if answer and lm.answer(text, answer).target_ids == tuple(
                lm.logits([text], at=[[len(lm.encode(text).rows()[0]) - 1]]).argmax(dim=-1).tolist()
            ):
                return Fact(prompt, subject, answer)
    raise AssertionError("no prompt of the list is answered by a visible token; add prompts")


def test_a_target_the_model_already_says_is_refused(tiny_llama: EditableLM) -> None:
    with pytest.raises(NothingToEditError, match=r"already answers .*; choose another target$"):
        optimise_value(tiny_llama, said_already(tiny_llama), layer=1, templates=TEMPLATES, hparams=HPARAMS)
