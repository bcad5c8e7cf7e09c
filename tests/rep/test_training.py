"""REP on a tiny random model: cached keys are the model's keys, the gate opens where it should and only there."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch.nn.functional import softplus

from rep_fast import editors
from rep_fast.collisions import CorpusSample
from rep_fast.editors import RomeHparams, ValueHparams
from rep_fast.edits import Edit, KeyAdapter, LowRank, ModuleEdit
from rep_fast.errors import HparamError
from rep_fast.facts import EditCase, Fact, MemoryText, Sided
from rep_fast.models import EditableLM, Site
from rep_fast.rep import NegativePool, RepHparams, SubjectForms, cache_keys, fit, train_adapters
from rep_fast.rep.objectives import calibrated_loss, paper_loss, protecting, soft_adapted
from rep_fast.stats import SecondMoments

LAYER = 1
FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
CASE = EditCase(
    7, FACT, subject_rephrases=Sided(("The Republic of Slovenia", "Slovenia in Europe"), ("Mount Triglav's Slovenia",))
)
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}")
HPARAMS = RepHparams(rank=4, steps=60, lr=1e-2, n_random=32, n_hard=16, n_subjects=4, n_other_tokens=40, tau=0.8)
OTHERS = ("Michael Jordan", "Kobe Bryant", "Danielle Darrieux", "Microsoft Windows", "The Eiffel Tower")


@pytest.fixture(scope="module")
def rome_edit(tiny_llama: EditableLM) -> Edit:
    width = tiny_llama.key_width(LAYER)
    keys = torch.randn(6 * width, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moments = SecondMoments.from_matrices(
        {LAYER: keys.T @ keys / len(keys)}, {LAYER: len(keys)}, corpus="random", fingerprint=tiny_llama.fingerprint
    )
    hparams = RomeHparams(layer=LAYER, value=ValueHparams(v_steps=4, early_stop=None))
    return editors.get("rome")(tiny_llama, [FACT], moments=moments, hparams=hparams, templates=TEMPLATES)


@pytest.fixture(scope="module")
def pool(tiny_llama: EditableLM) -> NegativePool:
    text = MemoryText("text", [f"{name} plays basketball in the city of Paris. I think so." for name in OTHERS] * 8)
    corpus = CorpusSample.collect(tiny_llama, text, LAYER, tokens=400, block=64)
    facts = [Fact("{} is located in", name, "Paris") for name in OTHERS]
    return NegativePool.of_facts(facts, corpus)


@pytest.fixture(scope="module")
def forms(tiny_llama: EditableLM) -> SubjectForms:
    return SubjectForms.of_case(tiny_llama, CASE, seed=0)


def test_training_texts_are_the_in_domain_side_only(tiny_llama: EditableLM, forms: SubjectForms) -> None:
    texts = forms.texts(TEMPLATES)
    assert texts[0] == (FACT.prompt, FACT.subject)
    subjects = {subject for _, subject in texts}
    assert set(CASE.subject_rephrases.in_domain) < subjects
    assert not subjects & set(CASE.subject_rephrases.out_of_domain)
    assert len(texts) == len(TEMPLATES) * (1 + 2 + len(forms.shuffles))
    assert not any(FACT.target_new in prompt for prompt, _ in texts)


def test_cached_keys_are_the_edited_models_keys(
    tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms, pool: NegativePool
) -> None:
    """T-rep-commute, T-rep-cached: keys at the edited layer depend neither on ΔW nor on later tokens."""
    cached = cache_keys(tiny_llama, rome_edit, LAYER, forms, pool, templates=TEMPLATES, hparams=HPARAMS, seed=0)
    found = [tiny_llama.locate(prompt, subject) for prompt, subject in forms.texts(TEMPLATES)]
    with rome_edit.applied(tiny_llama), tiny_llama.capture([Site("key", LAYER)]) as seen, torch.no_grad():
        tiny_llama.logits(tiny_llama.encode([one.ids for one in found]))
    keys = seen.at(Site("key", LAYER), torch.tensor([one.position for one in found]))
    torch.testing.assert_close(torch.cat([cached.anchor[None], cached.positives]), keys, rtol=1e-4, atol=1e-5)


def test_every_calibrated_step_sees_the_forms_in_the_bare_prompt(
    tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms, pool: NegativePool
) -> None:
    """One step on one drawn positive: its loss is the loss over the bare forms and that one."""
    hparams = dataclasses.replace(HPARAMS, steps=1, batch=1)
    cached = cache_keys(tiny_llama, rome_edit, LAYER, forms, pool, templates=TEMPLATES, hparams=hparams, seed=3)
    texts = forms.texts(TEMPLATES)
    bare = [row for row, (prompt, form) in enumerate(texts) if prompt == FACT.prompt and form != FACT.subject]
    assert forms.bare_rows(TEMPLATES) == bare
    assert torch.equal(cached.bare, torch.cat([cached.anchor[None], cached.positives])[bare])

    start = KeyAdapter.initial(cached.anchor.shape[0], rank=4, seed=3).weights
    order = list(range(len(cached.positives)))
    random.Random("order/3").shuffle(order)
    rows = torch.cat([cached.bare, cached.positives[order[:1]]])
    logits, negative = (torch.ops.rep_fast.gate_logits(part, list(start)) for part in (rows, cached.negatives))
    wanted = (1 - rows @ cached.response).square().mean() + softplus(-logits).mean() + softplus(negative).mean()
    _, losses = fit(start, cached, hparams, seed=3)
    assert losses[0] == pytest.approx(float(wanted), rel=1e-5)  # B = 0: nothing is moved yet


def test_paper_steps_follow_a_plain_loop(tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms) -> None:
    hparams = dataclasses.replace(HPARAMS, objective="paper", steps=5, lr=5e-3, batch=4, consistency=10.0)
    cached = cache_keys(tiny_llama, rome_edit, LAYER, forms, None, templates=TEMPLATES, hparams=hparams, seed=3)
    start = KeyAdapter.initial(cached.anchor.shape[0], rank=4, seed=3).weights
    _, losses = fit(start, cached, hparams, seed=3)

    order = list(range(len(cached.positives)))
    random.Random("order/3").shuffle(order)
    leaves = type(start)(*(part.clone().requires_grad_() for part in start))
    optimiser = torch.optim.Adam(list(leaves), lr=5e-3)
    for step, loss_found in enumerate(losses):
        rows = [order[(4 * step + i) % len(order)] for i in range(4)]
        adapted = soft_adapted(cached.positives[rows], leaves)[0]
        moved = soft_adapted(cached.anchor[None], leaves)[0][0]
        loss = paper_loss(adapted, cached.target, moved, cached.anchor, alpha=10.0)
        assert loss_found == pytest.approx(float(loss.detach()), rel=1e-6)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_calibrated_steps_follow_a_plain_loop(
    tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms, pool: NegativePool
) -> None:
    """Dropout, the protected span, batches and the bare forms together, from an adapter that moves keys already."""
    hparams = dataclasses.replace(HPARAMS, steps=4, lr=5e-3, batch=4, negative_batch=6, dropout=0.3)
    cached = cache_keys(tiny_llama, rome_edit, LAYER, forms, pool, templates=TEMPLATES, hparams=hparams, seed=3)
    generator = torch.Generator().manual_seed(8)
    start = KeyAdapter.initial(cached.anchor.shape[0], rank=4, seed=3).weights
    start = start._replace(b=0.1 * torch.randn(start.b.shape, generator=generator))
    found, losses = fit(start, cached, hparams, seed=3)

    def shuffled(rows: torch.Tensor, name: str) -> torch.Tensor:
        order = list(range(len(rows)))
        random.Random(name).shuffle(order)
        return rows[order]

    positives, negatives = shuffled(cached.positives, "order/3"), shuffled(cached.negatives, "negatives/3")
    generator = torch.Generator().manual_seed(3)
    leaves = type(start)(*(part.clone().requires_grad_() for part in start))
    optimiser = torch.optim.Adam(list(leaves), lr=5e-3)
    for step, loss_found in enumerate(losses):
        drawn = positives[[(4 * step + i) % len(positives) for i in range(4)]]
        rows = torch.cat([cached.bare, drawn, cached.anchor[None]])
        dropped = rows * (torch.rand(rows.shape, generator=generator) >= 0.3) / 0.7
        held = protecting(leaves, cached.prompt_basis)
        moved, logits = soft_adapted(rows, held, entering=dropped)
        shut = soft_adapted(negatives[[(6 * step + i) % len(negatives) for i in range(6)]], held)[1]
        loss = calibrated_loss(
            moved[:-1], rows[:-1], logits[:-1], shut, moved[-1], cached.anchor, cached.response,
            alpha=hparams.consistency, response_target=1.0, response_weight=1.0, shift_weight=0.1, negative_weight=1.0,
        )  # fmt: skip
        assert loss_found == pytest.approx(float(loss.detach()), rel=1e-4)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for part, wanted in zip(found, protecting(leaves, cached.prompt_basis), strict=True):
        torch.testing.assert_close(part, wanted.detach(), rtol=1e-3, atol=1e-5)


def test_calibrated_training_reaches_unit_response_and_spares_the_negatives(
    tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms, pool: NegativePool
) -> None:
    hparams = dataclasses.replace(HPARAMS, steps=300)
    trained = train_adapters(tiny_llama, rome_edit, forms, pools={LAYER: pool}, templates=TEMPLATES, hparams=hparams)
    notes = trained.modules[0].adapters[0].notes
    assert notes["open_on_positives"] > 0.9
    assert notes["open_on_negatives"] < 0.05
    assert abs(notes["rho_after"] - 1) < min(0.1, abs(notes["rho_before"] - 1))
    assert notes["loss_last"] < notes["loss_first"]


def test_training_is_deterministic_and_leaves_the_edit_alone(
    tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms, pool: NegativePool
) -> None:
    """T-det for adapters; dropout and batches included."""
    hparams = dataclasses.replace(HPARAMS, steps=4, dropout=0.2, batch=5, negative_batch=7)

    def weights(seed: int) -> torch.Tensor:
        trained = train_adapters(
            tiny_llama, rome_edit, forms, pools={LAYER: pool}, templates=TEMPLATES, hparams=hparams, seed=seed
        )
        return trained.modules[0].adapters[0].weights.b

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert rome_edit.modules[0].adapters == ()


@pytest.fixture(scope="module")
def two_layers(tiny_llama: EditableLM, rome_edit: Edit) -> Edit:
    """The edit with a second module below, whose update is large enough to move the keys above it."""
    generator = torch.Generator().manual_seed(4)
    upper = rome_edit.modules[0]
    key = tiny_llama.keys([FACT.text], 0)[0][1]
    direction = key + 0.1 * torch.randn(key.shape, generator=generator)
    response = direction / (key @ direction)
    delta = LowRank(torch.randn(tiny_llama.hidden_size, 1, generator=generator), response[None])
    vectors = {"k_star": key, "direction": direction, "response": response}
    return dataclasses.replace(rome_edit, modules=(upper, ModuleEdit(0, delta, vectors=vectors)))


@pytest.mark.parametrize("multilayer", ["in_order", "frozen_keys"])
def test_a_layer_is_trained_on_the_keys_it_will_meet(
    tiny_llama: EditableLM, two_layers: Edit, forms: SubjectForms, pool: NegativePool, multilayer: str
) -> None:
    """Lowest layer first; the layer above sees ΔW below it, and the trained adapter there unless keys are frozen."""
    hparams = dataclasses.replace(HPARAMS, steps=5, tau=0.0, multilayer=multilayer)
    pools = {0: dataclasses.replace(pool, corpus=dataclasses.replace(pool.corpus, layer=0)), LAYER: pool}
    trained = train_adapters(tiny_llama, two_layers, forms, pools=pools, templates=TEMPLATES, hparams=hparams)
    assert tiny_llama.active_edits == []
    lower = trained.module(0) if multilayer == "in_order" else two_layers.module(0)
    with dataclasses.replace(trained, modules=(lower,)).applied(tiny_llama):
        keys = cache_keys(tiny_llama, trained, LAYER, forms, pool, templates=TEMPLATES, hparams=hparams, seed=0)
    start = KeyAdapter.initial(
        tiny_llama.key_width(LAYER), rank=hparams.rank, gate_hidden=hparams.gate_hidden(tiny_llama.key_width(LAYER))
    ).weights
    expected, _ = fit(start, keys, hparams, seed=0)
    for part, wanted in zip(trained.module(LAYER).adapters[0].weights, expected, strict=True):
        torch.testing.assert_close(part, wanted)
    clean = cache_keys(tiny_llama, trained, LAYER, forms, pool, templates=TEMPLATES, hparams=hparams, seed=0)
    assert not torch.allclose(clean.positives, keys.positives, atol=1e-3)


@pytest.mark.parametrize("compose", ["chain", "argmax", "sum"])
def test_an_adapter_is_trained_on_the_keys_its_composition_hands_it(
    tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms, pool: NegativePool, compose: Any
) -> None:
    """methods §6.5: behind an earlier edit's adapter in a chain, on native keys where all adapters see the same key."""
    width = tiny_llama.key_width(LAYER)
    start = KeyAdapter.initial(width, rank=2, tau=0.0)
    b = torch.randn(start.weights.b.shape, generator=torch.Generator().manual_seed(0))
    earlier = ModuleEdit(LAYER, None, (KeyAdapter(start.weights._replace(b=b), tau=0.0),))
    options: Any = {"pools": {LAYER: pool}, "templates": TEMPLATES, "hparams": dataclasses.replace(HPARAMS, steps=3)}
    native = train_adapters(tiny_llama, rome_edit, forms, **options)
    with Edit((), "earlier", {}, tiny_llama.fingerprint, (earlier,)).applied(tiny_llama, compose=compose):
        behind = tiny_llama.keys([FACT.text], [LAYER])[LAYER]
        trained = train_adapters(tiny_llama, rome_edit, forms, **options)
        assert torch.equal(tiny_llama.keys([FACT.text], [LAYER])[LAYER], behind)  # the earlier adapter is back
    pairs = zip(trained.module(LAYER).adapters[0].weights, native.module(LAYER).adapters[0].weights, strict=True)
    assert all(torch.equal(one, two) for one, two in pairs) == (compose != "chain")


def test_refusals(tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms, pool: NegativePool) -> None:
    def train(edit: Edit, **changes: Any) -> Edit:
        options = {"pools": {LAYER: pool}, "templates": TEMPLATES, "hparams": HPARAMS, **changes}
        return train_adapters(tiny_llama, edit, forms, **options)

    with pytest.raises(HparamError, match="needs negatives"):
        train(rome_edit, pools={})
    elsewhere = dataclasses.replace(pool, corpus=dataclasses.replace(pool.corpus, layer=0))
    with pytest.raises(HparamError, match="keys of layer 0, the edit is at layer 1"):
        train(rome_edit, pools={LAYER: elsewhere})
    with pytest.raises(HparamError, match=r"first context template must be the bare '{}', got \['Hello. {}'\]"):
        train(rome_edit, templates=("Hello. {}", "{}"))
    none = {"n_random": 0, "n_hard": 0, "n_subjects": 0, "n_other_tokens": 0}
    with pytest.raises(HparamError, match="no negatives were drawn; raise n_random"):
        train(rome_edit, hparams=dataclasses.replace(HPARAMS, **none))
    with pytest.raises(HparamError, match="n_hard of at least 0, got -1"):
        RepHparams(n_hard=-1)
    with pytest.raises(HparamError, match="no other form of 'Slovenia' and no context"):
        train_adapters(
            tiny_llama, rome_edit, SubjectForms(FACT), pools={LAYER: pool}, templates=("{}",), hparams=HPARAMS
        )
    with pytest.raises(HparamError, match="lacks the vectors"):
        train(dataclasses.replace(rome_edit, modules=(dataclasses.replace(rome_edit.modules[0], vectors={}),)))
    with pytest.raises(HparamError, match="multilayer 'both' is unknown"):
        RepHparams(multilayer="both")
    with pytest.raises(HparamError, match="objective 'papers' is unknown"):
        RepHparams(objective="papers")


def test_the_edited_prompt_is_answered_as_without_the_adapter(
    tiny_llama: EditableLM, rome_edit: Edit, forms: SubjectForms, pool: NegativePool
) -> None:
    """Every key of the bare prompt passes unchanged to rounding, even with a gate that is always open."""
    hparams = dataclasses.replace(HPARAMS, tau=0.0)
    robust = train_adapters(tiny_llama, rome_edit, forms, pools={LAYER: pool}, templates=TEMPLATES, hparams=hparams)
    with rome_edit.applied(tiny_llama):
        plain = tiny_llama.logits([FACT.text])
    with robust.applied(tiny_llama):
        adapted = tiny_llama.logits([FACT.text])
    torch.testing.assert_close(adapted, plain, rtol=1e-4, atol=1e-4)
    with robust.applied(tiny_llama):
        other = tiny_llama.logits(["The Republic of Slovenia belongs to the continent of"])
    with rome_edit.applied(tiny_llama):
        assert not torch.allclose(other, tiny_llama.logits(["The Republic of Slovenia belongs to the continent of"]))
