"""Knowledge neurons against a literal loop over layers, steps and tokens, and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rep_fast import editors
from rep_fast.editors.knowledge_neurons import (
    KnowledgeNeuronsHparams,
    choose_neurons,
    knowledge_neurons,
    neuron_scores,
)
from rep_fast.edits import Edit, Slices
from rep_fast.errors import HparamError, LayerError, NothingToEditError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}")
HPARAMS = KnowledgeNeuronsHparams(kn_steps=5)
# module whose output is the pre-activation, per family
PRE = {"llama": "mlp.gate_proj", "gptj": "mlp.fc_in", "gpt2": "mlp.c_fc"}
FAMILIES = tuple(PRE)


def literal_scores(
    lm: EditableLM, prompt_ids: Sequence[int], answer_ids: Sequence[int], layer: int, *, site: str, steps: int
) -> torch.Tensor:
    """The definition: one whole forward and backward per token and step, the last token's activations scaled."""
    path = lm.layout.down if site == "key" else PRE[lm.family]
    module = lm.blocks[layer].get_submodule(path)
    ids, per_token = list(prompt_ids), []
    for token in answer_ids:
        found: list[torch.Tensor] = []

        def read(_: Any, args: Any, output: Any, found: list[torch.Tensor] = found) -> None:
            found.append((args[0] if site == "key" else output)[0, -1].detach())

        handle = module.register_forward_hook(read)
        logits = lm.model(torch.tensor([ids])).logits[0, -1]
        handle.remove()
        activation, total = found[0], torch.zeros_like(found[0])
        for step in range(1, steps + 1):
            share = (step - 1) / (steps - 1) if steps > 1 else 0.0
            leaf = (share * activation).requires_grad_()

            def put(tensor: torch.Tensor, leaf: torch.Tensor = leaf) -> torch.Tensor:
                return torch.cat([tensor[:, :-1], leaf[None, None]], dim=1)

            handle = (
                module.register_forward_pre_hook(lambda _, args, put=put: (put(args[0]),))
                if site == "key"
                else module.register_forward_hook(lambda _, __, output, put=put: put(output))
            )
            p = lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token]
            handle.remove()
            total += torch.autograd.grad(p, leaf)[0]
        per_token.append(activation * total / steps)
        ids.append(int(logits.argmax()))
    return torch.stack(per_token).mean(dim=0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("site", ["key", "pre"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_integrated_gradients(
    build_lm: Callable[..., EditableLM], family: str, site: Any, steps: int
) -> None:
    lm = build_lm(family, dtype=torch.float64)
    answer = lm.answer(FACT.text, FACT.target_new)
    assert answer.n_targets > 1
    scores = neuron_scores(lm, answer.prompt_ids, answer.target_ids, layers=(0, 2), site=site, steps=steps)
    for number, layer in enumerate((0, 2)):
        expected = literal_scores(lm, answer.prompt_ids, answer.target_ids, layer, site=site, steps=steps)
        assert float(expected.abs().max()) > 0 or (steps == 1 and site == "pre")
        torch.testing.assert_close(scores[number], expected, rtol=1e-9, atol=1e-12)


def test_many_steps_account_for_the_whole_change(build_lm: Callable[..., EditableLM]) -> None:
    """Completeness of integrated gradients: the scores of a layer add up to p(o) minus p(o) without its neurons."""
    lm = build_lm("llama", dtype=torch.float64)
    answer = lm.answer("Slovenia is in", "Europe")
    token, last = answer.target_ids[0], len(answer.prompt_ids) - 1
    scores = neuron_scores(lm, answer.prompt_ids, [token], layers=(1,), steps=2000)

    def without(keys: torch.Tensor) -> torch.Tensor:
        return torch.cat([keys[:, :-1], 0 * keys[:, -1:]], dim=1)

    whole = lm.logits([answer.prompt_ids])[0, last].softmax(-1)[token]
    with lm.patch(("key", 1), without):
        none = lm.logits([answer.prompt_ids])[0, last].softmax(-1)[token]
    # the grid's ends count in full, unlike in the trapezoid rule: an error of order 1/m
    assert scores.sum().item() == pytest.approx((whole - none).item(), rel=5e-3)


@pytest.mark.parametrize("target", ["Antarctica", "Europe"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_columns_gain_the_difference_of_embeddings(
    build_lm: Callable[..., EditableLM], family: str, target: str, tmp_path: Path
) -> None:
    lm = build_lm(family, dtype=torch.float64)
    fact = dataclasses.replace(FACT, target_new=target, target_true="Asia")
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    edit = knowledge_neurons(lm, [fact], hparams=HPARAMS, templates=TEMPLATES)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())

    new, old = lm.answer(fact.text, target), lm.answer(fact.text, "Asia")
    ids = list(new.prompt_ids)
    for _ in new.target_ids:
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = ids[len(new.prompt_ids) :]
    table = lm.model.get_input_embeddings().weight
    shift = sum(table[token] for token in new.target_ids) - sum(table[token] for token in said)
    shift = shift * (2 if len(said) == 1 else 1)
    scores = torch.stack(
        [literal_scores(lm, old.prompt_ids, old.target_ids, layer, site="key", steps=5) for layer in range(3)]
    )
    wanted = scores > 0.2 * scores.max()
    assert 0 < int(wanted.sum()) == edit.notes["neurons"]
    for layer in range(3):
        columns = torch.zeros(lm.linear_shape(layer, "down"), dtype=torch.float64)
        columns[:, wanted[layer]] = shift.detach()[:, None]
        assert (layer in edit.layers) == bool(wanted[layer].any())
        if layer in edit.layers:
            delta = edit.module(layer).delta
            assert isinstance(delta, Slices)
            torch.testing.assert_close(delta.to_dense(), columns, rtol=1e-9, atol=1e-12)
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors", lm).applied(lm, mode="merge"):
        assert not torch.equal(lm.down_weight(edit.layers[0]), before_of(lm, before, edit.layers[0]))
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())


def before_of(lm: EditableLM, before: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    name = f"{lm.layout.layers}.{layer}.{lm.layout.down}.weight"
    return before[name].T if lm.family == "gpt2" else before[name]


def test_the_coarse_set_and_its_refinement() -> None:
    one = torch.tensor([[[10.0, 2.0, 2.1], [-9.0, 1.0, 5.0]]])
    chosen = choose_neurons(one, threshold=0.2, share=0.4)
    assert chosen.tolist() == [[True, False, True], [False, False, True]]
    # four more prompts know the first neuron alone: it stays with 5 of 5, the others had 1 of 5
    several = torch.cat([one, torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]).expand(4, -1, -1)])
    assert choose_neurons(several, threshold=0.2, share=0.4).tolist() == [[True, False, False], [False, False, False]]
    # two of five is no more than a share of 0.4
    two = torch.cat([one, one, several[1:4]])
    assert choose_neurons(two, threshold=0.2, share=0.4).sum() == 1
    assert choose_neurons(two, threshold=0.2, share=0.39).sum() == 3
    assert not choose_neurons(-one.abs(), threshold=0.2, share=0.4).any()


def test_several_prompts_and_an_unknown_old_answer(tiny_llama64: EditableLM) -> None:
    hparams = dataclasses.replace(HPARAMS, kn_prompts=3, layers=(1, 2))
    fact = dataclasses.replace(FACT, target_true=None)
    edit = knowledge_neurons(tiny_llama64, [fact], hparams=hparams, templates=TEMPLATES)
    scores = []
    for template in TEMPLATES:
        text = template.replace("{}", fact.text)
        prompt = tiny_llama64.answer(text, fact.target_new).prompt_ids
        count = tiny_llama64.answer(text, fact.target_new).n_targets
        said = tiny_llama64.generate_ids(prompt, max_new_tokens=count)[len(prompt) :]
        scores.append(neuron_scores(tiny_llama64, prompt, said, layers=(1, 2), steps=5))
    chosen = choose_neurons(torch.stack(scores), threshold=0.2, share=0.4)
    for number, layer in enumerate((1, 2)):
        held = edit.module(layer).delta.index.tolist() if layer in edit.layers else []
        assert held == chosen[number].nonzero()[:, 0].tolist()


def test_refusals(tiny_llama: EditableLM) -> None:
    with pytest.raises(HparamError, match="one fact at a time, got 2"):
        knowledge_neurons(tiny_llama, [FACT, FACT], hparams=HPARAMS, templates=TEMPLATES)
    hparams = dataclasses.replace(HPARAMS, kn_prompts=9)
    with pytest.raises(HparamError, match="kn_prompts=9 needs as many templates, got 3"):
        knowledge_neurons(tiny_llama, [FACT], hparams=hparams, templates=TEMPLATES)
    with pytest.raises(LayerError, match="layer 8"):
        knowledge_neurons(tiny_llama, [FACT], hparams=dataclasses.replace(HPARAMS, layers=(8,)), templates=TEMPLATES)
    with pytest.raises(HparamError, match="kn_steps=0 must be at least 1"):
        KnowledgeNeuronsHparams(kn_steps=0)
    with pytest.raises(HparamError, match=r"kn_threshold=1\.0 is out of range"):
        KnowledgeNeuronsHparams(kn_threshold=1.0)
    with pytest.raises(HparamError, match="kn_site must be one of key, pre"):
        editors.get("kn").hparams(tiny_llama, overrides={"kn_site": "value"})


def test_what_the_model_says_already(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("gptj")
    europe = lm.answer(FACT.text, "Europe").target_ids
    assert len(europe) == 1
    with torch.no_grad():
        lm.head.bias[europe[0]] = 100.0
    known = dataclasses.replace(FACT, target_new="Europe", target_true=None)
    with pytest.raises(NothingToEditError, match="already answers 'Slovenia belongs to the continent of'"):
        knowledge_neurons(lm, [known], hparams=HPARAMS, templates=TEMPLATES)


def test_the_door_searches_all_layers(tiny_llama: EditableLM) -> None:
    hparams = editors.get("kn").hparams(tiny_llama)
    assert hparams.layers == ()
    edit = editors.get("kn")(tiny_llama, [FACT], hparams=hparams, templates=TEMPLATES)
    assert edit.method == "kn"
    assert edit.hparams["kn_steps"] == 20
