"""Fine-tuning against Adam on the real weight, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rep_fast import editors
from rep_fast.editors.fine_tuning import FineTuningHparams, fine_tune
from rep_fast.edits import Dense, Edit
from rep_fast.errors import HparamError, LayerError, NothingToEditError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

FACTS = (
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean", "French"),
    Fact("{} plays the sport of", "Michael Jordan", "tennis", "basketball"),
)
NAMES = ("ft", "ft-l", "ft-c", "ft-m")
HPARAMS = FineTuningHparams(layers=(1,), ft_steps=4, ft_lr=5e-3)


def trained_weights(lm: EditableLM, facts: Sequence[Fact], hparams: FineTuningHparams) -> dict[int, torch.Tensor]:
    """W − W_0 [D, M] of the definition: the model's own weights are trained, one whole forward per update."""
    weights: dict[int, Any] = {layer: lm.down_proj(layer).weight for layer in hparams.layers}
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    lm.model.requires_grad_(False)
    optimiser = torch.optim.Adam([weight.requires_grad_() for weight in weights.values()], lr=hparams.ft_lr)
    for _ in range(hparams.ft_steps):
        total = 0.0
        for begin in range(0, len(facts), hparams.ft_batch):
            chunk = facts[begin : begin + hparams.ft_batch]
            optimiser.zero_grad()
            loss = torch.stack([fact_loss(lm, fact, hparams) for fact in chunk]).mean()
            total += loss.item() * len(chunk)
            if loss < 0.01:
                continue
            loss.backward()
            optimiser.step()
            if hparams.norm_constraint is not None:
                with torch.no_grad():
                    for layer, weight in weights.items():
                        centre, reach = before[layer], hparams.norm_constraint
                        weight.copy_(torch.minimum(torch.maximum(weight, centre - reach), centre + reach))
        if total / len(facts) < 0.01:
            break
    changes = {layer: (weight - before[layer]).detach() for layer, weight in weights.items()}
    return {layer: change.T if lm.family == "gpt2" else change for layer, change in changes.items()}


def confident(lm: EditableLM) -> EditableLM:
    """With logits eight times as large; the tiny models' own are too small for any answer to become certain."""
    with torch.no_grad():
        lm.head.weight.mul_(8)
    return lm


def fact_loss(lm: EditableLM, fact: Fact, hparams: FineTuningHparams) -> torch.Tensor:
    answer = lm.answer(fact.text, fact.target_new, mode=hparams.target_tok)
    ids = answer.prompt_ids if hparams.ft_objective == "prompt_last" else answer.input_ids
    log_p = lm.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    if hparams.ft_objective == "prompt_last":
        return -log_p[-1, list(answer.target_ids)].mean()
    return -torch.stack(
        [log_p[at, token] for at, token in zip(answer.positions, answer.target_ids, strict=True)]
    ).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_constraint": 2e-3},
        {"ft_objective": "target_new"},
        {"ft_objective": "target_new", "layers": (2, 0), "ft_batch": 2},
    ],
    ids=["ft", "ft-l", "ft-m", "ft-m, two layers, batch"],
)
@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2"])
def test_the_delta_is_what_adam_does_to_the_weight(
    build_lm: Callable[..., EditableLM], family: str, changes: dict[str, Any]
) -> None:
    hparams = dataclasses.replace(HPARAMS, **changes)
    lm = build_lm(family, dtype=torch.float64)
    edit = fine_tune(lm, FACTS, hparams=hparams, method="ft-m")
    expected = trained_weights(build_lm(family, dtype=torch.float64), FACTS, hparams)
    assert edit.layers == hparams.layers
    for layer, change in expected.items():
        delta = edit.module(layer).delta
        assert isinstance(delta, Dense)
        torch.testing.assert_close(delta.matrix, change, rtol=1e-9, atol=1e-9 * float(change.abs().max()))
    if hparams.norm_constraint is not None:
        # the limit binds, else the case would not test it
        largest = max(float(change.abs().max()) for change in expected.values())
        assert largest == pytest.approx(hparams.norm_constraint, rel=1e-9)
        assert float(edit.module(1).delta.matrix.abs().max()) <= hparams.norm_constraint


def test_the_stop_rules_are_the_definition_s(build_lm: Callable[..., EditableLM]) -> None:
    """Facts that are learned are left alone while the others are trained; the run ends once all are."""
    hparams = dataclasses.replace(HPARAMS, ft_objective="target_new", ft_steps=60, ft_lr=2e-2)
    lm = confident(build_lm("llama", dtype=torch.float64))
    edit = fine_tune(lm, FACTS, hparams=hparams)
    losses = edit.notes["losses"]
    assert len(losses) < 60
    assert losses[-1] < 0.01 <= min(losses[:-1])
    assert edit.notes["updates"] < (len(losses) - 1) * len(FACTS)
    expected = trained_weights(confident(build_lm("llama", dtype=torch.float64)), FACTS, hparams)[1]
    delta = edit.module(1).delta
    assert delta is not None
    # many updates let rounding grow: the last passes are steps of full size along gradients near zero
    torch.testing.assert_close(delta.to_dense(), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_the_model_is_not_touched(fresh_lm: EditableLM) -> None:
    before = {name: weight.clone() for name, weight in fresh_lm.model.state_dict().items()}
    fine_tune(fresh_lm, FACTS[:1], hparams=dataclasses.replace(HPARAMS, layers=(0, 2)))
    assert fresh_lm.active_edits == []
    assert all(torch.equal(weight, before[name]) for name, weight in fresh_lm.model.state_dict().items())
    assert all(parameter.grad is None for parameter in fresh_lm.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fresh_lm.model.modules())


def test_a_half_precision_model_gets_a_float32_delta(build_lm: Callable[..., EditableLM], tmp_path: Path) -> None:
    lm = build_lm("llama").model.to(torch.bfloat16)
    half = EditableLM(lm, build_lm("llama").tokenizer)
    edit = fine_tune(half, FACTS[:1], hparams=dataclasses.replace(HPARAMS, ft_objective="target_new", ft_steps=25))
    delta = edit.module(1).delta
    assert isinstance(delta, Dense)
    assert delta.matrix.dtype == torch.float32
    assert edit.notes["losses"][-1] < 0.6 * edit.notes["losses"][0]
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors", half).applied(half):
        answer = half.answer(FACTS[0].text, FACTS[0].target_new)
        log_p = half.logits([answer.input_ids])[0, list(answer.positions)].float().log_softmax(-1)
        loss = -log_p.gather(1, torch.tensor(answer.target_ids)[:, None]).mean()
    assert loss.item() < edit.notes["losses"][0]


def test_an_edit_on_top_of_another_sees_it(build_lm: Callable[..., EditableLM]) -> None:
    """The first loss of a second run is where the first run ended."""
    lm = build_lm("llama", dtype=torch.float64)
    first = fine_tune(lm, FACTS[:1], hparams=HPARAMS)
    one_more = dataclasses.replace(HPARAMS, ft_steps=HPARAMS.ft_steps + 1)
    with first.applied(lm):
        second = fine_tune(lm, FACTS[:1], hparams=HPARAMS)
        assert len(lm.active_edits) == 1
    assert second.notes["losses"][0] == pytest.approx(fine_tune(lm, FACTS[:1], hparams=one_more).notes["losses"][-1])


def test_refusals(build_lm: Callable[..., EditableLM]) -> None:
    lm = confident(build_lm("llama"))
    with pytest.raises(LayerError, match="layer 7"):
        fine_tune(lm, FACTS[:1], hparams=dataclasses.replace(HPARAMS, layers=(7,)))
    learned = dataclasses.replace(HPARAMS, ft_objective="target_new", ft_steps=60, ft_lr=2e-2)
    with (
        fine_tune(lm, FACTS[:1], hparams=learned).applied(lm),
        pytest.raises(NothingToEditError, match="'Slovenia belongs to the continent of'"),
    ):
        fine_tune(lm, FACTS[:1], hparams=learned)
    with pytest.raises(HparamError, match="at least one layer, and each once"):
        FineTuningHparams(layers=(1, 1))
    with pytest.raises(HparamError, match="ft_batch=0 must be positive"):
        FineTuningHparams(layers=(1,), ft_batch=0)
    with pytest.raises(HparamError, match="norm_constraint=0 must be positive"):
        FineTuningHparams(layers=(1,), norm_constraint=0)


def test_the_door_gives_every_name_its_settings(tiny_llama: EditableLM) -> None:
    settings = {name: editors.get(name).hparams(tiny_llama, overrides={"layers": [1]}) for name in NAMES}
    assert {name: hparams.norm_constraint is not None for name, hparams in settings.items()} == {
        "ft": False, "ft-l": True, "ft-c": True, "ft-m": False,
    }  # fmt: skip
    objectives = [settings[name].ft_objective for name in NAMES]
    assert objectives == ["prompt_last", "prompt_last", "prompt_last", "target_new"]
    edit = editors.get("ft-m")(tiny_llama, FACTS, hparams=dataclasses.replace(settings["ft-m"], ft_steps=1))
    assert edit.method == "ft-m"
    assert edit.facts == FACTS
    assert edit.hparams["layers"] == [1]
