"""v*: the fast optimisation follows the definition, on every model family."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rep_fast.editors import ValueHparams, optimise_value
from rep_fast.editors.plain_value import optimise_value_plainly
from rep_fast.editors.value import ATTENTION_AND_VALUE, HIDDEN, SITES, VALUE, optimise_values
from rep_fast.editors.value_texts import edit_texts
from rep_fast.errors import HparamError, LayerError, NothingToEditError, TokenizationError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}")
BATCH = (
    FACT,
    Fact("The Republic of {} is in", "Slovenia", "Paris"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean"),
    Fact("{} plays the sport of", "Kobe Bryant", "Los Angeles"),
)
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


@pytest.mark.parametrize("loss_layer", [None, 1, 2])
@pytest.mark.parametrize("sites", [HIDDEN, ATTENTION_AND_VALUE], ids="+".join)
def test_other_sites_follow_the_definition(
    tiny_lm64: EditableLM, sites: tuple[str, ...], loss_layer: int | None
) -> None:
    """MEMIT's and PMET's sites, targets read after any layer from the edited one on."""
    hparams = dataclasses.replace(HPARAMS, v_loss_layer=loss_layer)
    settings = {"layer": 1, "templates": TEMPLATES, "hparams": hparams, "sites": sites}
    # read right after the edited layer only answers at the subject itself depend on the value: elsewhere the gradient
    # would be rounding, which Adam makes as large as any other
    fact = Fact("The continent of {}", "Slovenia", "Antarctica") if loss_layer == 1 else FACT
    fast = optimise_value(tiny_lm64, fact, **settings)
    plain = optimise_value_plainly(tiny_lm64, fact, **settings)
    torch.testing.assert_close(fast.deltas, plain.deltas, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast.losses, plain.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(fast.v_star, plain.v_star, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast.values, plain.values, rtol=1e-12, atol=1e-12)
    assert (fast.attention_deltas is not None) == (sites == ATTENTION_AND_VALUE)
    if fast.attention_deltas is not None:
        torch.testing.assert_close(fast.attention_deltas, plain.attention_deltas, rtol=1e-9, atol=1e-12)
        assert float(fast.attention_deltas[-1].norm()) > 0


def test_the_lowest_layer_has_an_attention_too(tiny_llama64: EditableLM) -> None:
    settings = {"layer": 0, "templates": TEMPLATES, "hparams": HPARAMS, "sites": ATTENTION_AND_VALUE}
    fast = optimise_value(tiny_llama64, FACT, **settings)
    plain = optimise_value_plainly(tiny_llama64, FACT, **settings)
    torch.testing.assert_close(fast.attention_deltas, plain.attention_deltas, rtol=1e-9, atol=1e-12)


def test_v_0_is_the_value_of_the_bare_prompt_at_its_site(tiny_llama64: EditableLM) -> None:
    located = tiny_llama64.locate(FACT.prompt, FACT.subject)
    for sites in SITES:
        hparams = dataclasses.replace(HPARAMS, v_steps=1)
        found = optimise_value(tiny_llama64, FACT, layer=1, templates=TEMPLATES, hparams=hparams, sites=sites)
        site = Site(sites[-1], 1)
        wanted = tiny_llama64.read([located.ids], [site])[site][0, located.position]
        torch.testing.assert_close(found.v_0, wanted.detach(), rtol=1e-12, atol=1e-12)


def test_v_loss_layer_changes_nothing_for_rome(tiny_llama64: EditableLM) -> None:
    settings = {"layer": 0, "templates": TEMPLATES, "sites": VALUE}
    one = optimise_value(tiny_llama64, FACT, hparams=HPARAMS, **settings)
    other = optimise_value(tiny_llama64, FACT, hparams=dataclasses.replace(HPARAMS, v_loss_layer=1), **settings)
    assert torch.equal(one.deltas, other.deltas)


@pytest.mark.parametrize("max_tokens", [1, 70, 10**6])
@pytest.mark.parametrize("sites", SITES, ids="+".join)
def test_facts_of_a_batch_do_not_touch_each_other(
    tiny_llama64: EditableLM, sites: tuple[str, ...], max_tokens: int
) -> None:
    """Every fact gets what it gets alone, also where some stop long before others, in any chunks."""
    alone = [
        optimise_value(tiny_llama64, fact, layer=1, templates=TEMPLATES, hparams=HPARAMS, sites=sites) for fact in BATCH
    ]
    stop = sorted(found.losses[2] for found in alone)[1] * (1 + 1e-12)  # two of four are done at the third forward
    hparams = dataclasses.replace(HPARAMS, early_stop=stop)
    settings = {"layer": 1, "templates": TEMPLATES, "hparams": hparams, "sites": sites}
    alone = [optimise_value(tiny_llama64, fact, **settings) for fact in BATCH]
    together = optimise_values(tiny_llama64, [(fact,) for fact in BATCH], max_tokens=max_tokens, **settings)
    assert len({len(found.losses) for found in alone}) > 1
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other.losses, one.losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(other.deltas, one.deltas, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(other.keys, one.keys, rtol=1e-12, atol=1e-12)


def test_facts_of_one_key_share_a_value(tiny_llama64: EditableLM) -> None:
    """One δ for two relations of a subject: the mean of their losses, one KL term, one decay."""
    other = Fact("{} plays the sport of many", FACT.subject, "Los Angeles")
    settings = {"layer": 1, "templates": TEMPLATES, "hparams": HPARAMS, "sites": HIDDEN}
    (shared,) = optimise_values(tiny_llama64, [(FACT, other)], **settings)
    plain = optimise_value_plainly(tiny_llama64, FACT, together=[other], **settings)
    torch.testing.assert_close(shared.deltas, plain.deltas, rtol=1e-9, atol=1e-12)
    first, second = (optimise_value(tiny_llama64, fact, **settings) for fact in (FACT, other))
    assert shared.losses[0] == pytest.approx((first.losses[0] + second.losses[0]) / 2, rel=1e-9)
    assert len(shared.answered) == 2


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


def test_a_batch_is_refused_only_when_nothing_is_left_to_edit(tiny_llama: EditableLM) -> None:
    known = said_already(tiny_llama)
    settings = {"layer": 1, "templates": TEMPLATES, "hparams": HPARAMS}
    found = optimise_values(tiny_llama, [(known,), (FACT,)], **settings)
    assert [value.answered for value in found] == [(True,), (False,)]
    with pytest.raises(NothingToEditError):
        optimise_values(tiny_llama, [(known,), (known,)], **settings)


def test_sites_and_layers_out_of_range(tiny_llama: EditableLM) -> None:
    settings = {"layer": 1, "templates": TEMPLATES, "hparams": HPARAMS}
    with pytest.raises(HparamError, match=r"cannot be optimised at \('key',\); choose from"):
        optimise_value(tiny_llama, FACT, sites=("key",), **settings)
    settings["hparams"] = dataclasses.replace(HPARAMS, v_loss_layer=0)
    with pytest.raises(LayerError, match="layer 0 lies below layer 1"):
        optimise_value(tiny_llama, FACT, sites=HIDDEN, **settings)
