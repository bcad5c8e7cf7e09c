"""LoRA and AdaLoRA against a plain training run of peft's own model, and the model's way back."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rep_fast import editors
from rep_fast.editors.lora import LoraHparams, lora
from rep_fast.edits import Edit, LowRank
from rep_fast.errors import HparamError, LayerError, MissingDependencyError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

FACTS = (
    Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe"),
    Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean", "French"),
    Fact("{} plays the sport of", "Michael Jordan", "tennis", "basketball"),
)
HPARAMS = LoraHparams(lora_rank=3, lora_steps=4, lora_batch=2)
TARGETS = {"llama": ("q_proj", "v_proj"), "gptj": ("q_proj", "v_proj"), "gpt2": ("c_attn",)}


def trained_changes(lm: EditableLM, facts: Sequence[Fact], hparams: LoraHparams, seed: int) -> dict[str, torch.Tensor]:
    """Name of the target module → ΔW, as peft itself computes it."""
    import peft

    shared = {
        "lora_alpha": hparams.lora_alpha,
        "lora_dropout": hparams.lora_dropout,
        "target_modules": list(TARGETS[lm.family]),
        "fan_in_fan_out": lm.family == "gpt2",
    }
    config = (
        peft.LoraConfig(r=hparams.lora_rank, **shared)
        if hparams.lora_kind == "lora"
        else peft.AdaLoraConfig(
            init_r=hparams.lora_rank, target_r=hparams.lora_rank, total_step=hparams.lora_steps, **shared
        )
    )
    torch.manual_seed(seed)
    model = peft.get_peft_model(lm.model, config).train()
    factors = [p for name, p in model.named_parameters() if p.requires_grad and "ranknum" not in name]
    optimiser = torch.optim.Adam(factors, lr=hparams.lora_lr)
    for _ in range(hparams.lora_steps):
        for begin in range(0, len(facts), hparams.lora_batch):
            answers = [lm.answer(fact.text, fact.target_new) for fact in facts[begin : begin + hparams.lora_batch]]
            batch = lm.encode([answer.input_ids for answer in answers])
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            losses = [
                -logits[row].log_softmax(-1)[list(answer.positions), list(answer.target_ids)].mean()
                for row, answer in enumerate(answers)
            ]
            loss = torch.stack(losses).mean()
            if hparams.lora_kind == "adalora":
                loss = loss + 0.5 * regulariser(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if name.endswith(TARGETS[lm.family])
    }


def regulariser(model: Any) -> torch.Tensor:
    """As AdaLoRA's authors write it."""
    terms = []
    for name, factor in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize("family", list(TARGETS))
def test_the_deltas_are_peft_s(build_lm: Callable[..., EditableLM], family: str, kind: Any) -> None:
    hparams = dataclasses.replace(HPARAMS, lora_kind=kind)
    lm = build_lm(family, dtype=torch.float64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    edit = lora(lm, FACTS, hparams=hparams, seed=5)
    other = build_lm(family, dtype=torch.float64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    expected = trained_changes(other, FACTS, hparams, 5)
    assert len(expected) == len(edit.modules) == 3 * len(TARGETS[family])
    for module in edit.modules:
        assert isinstance(module.delta, LowRank)
        assert module.delta.rank == 3
        change = expected[lm.linear_name(*module.place)]
        change = change.T if family == "gpt2" else change
        assert float(change.abs().max()) > 1e-4
        torch.testing.assert_close(module.delta.to_dense(), change, rtol=1e-9, atol=1e-9 * float(change.abs().max()))


def test_the_model_gets_its_own_modules_back(fresh_lm: EditableLM) -> None:
    lm = fresh_lm
    lm.blocks[1].requires_grad_(False)
    modules = dict(lm.model.named_modules())
    weights = {name: (weight, weight.clone()) for name, weight in lm.model.state_dict(keep_vars=True).items()}
    flags = {name: parameter.requires_grad for name, parameter in lm.model.named_parameters()}
    attributes, random_state = set(vars(lm.model)), torch.get_rng_state()
    lora(lm, FACTS[:1], hparams=dataclasses.replace(HPARAMS, layers=(1, 2)))
    with pytest.raises(RuntimeError, match="interrupted"):
        lora(lm, FACTS[:1], hparams=_interrupting(lm))
    lm.logits([FACTS[0].text])
    assert dict(lm.model.named_modules()) == modules
    found = lm.model.state_dict(keep_vars=True)
    assert found.keys() == weights.keys()
    for name, (weight, values) in weights.items():
        assert found[name] is weight
        assert torch.equal(weight, values)
        assert weight.grad is None
    assert {name: parameter.requires_grad for name, parameter in lm.model.named_parameters()} == flags
    assert not any(module.training or module._forward_hooks for module in lm.model.modules())
    assert set(vars(lm.model)) == attributes
    assert torch.equal(torch.get_rng_state(), random_state)


def _interrupting(lm: EditableLM) -> LoraHparams:
    """Settings whose training ends with an error in the first forward."""

    def stop(*_: Any) -> None:
        handle.remove()
        raise RuntimeError("interrupted")

    handle = lm.head.register_forward_pre_hook(stop)
    return HPARAMS


def test_the_edit_speaks_the_new_target(build_lm: Callable[..., EditableLM], tmp_path: Path) -> None:
    lm = build_lm("gpt2")
    edit = lora(lm, FACTS[:1], hparams=LoraHparams(lora_steps=30, lora_kind="lora"))
    losses = edit.notes["losses"]
    assert losses[-1] < 0.7 * losses[0]
    edit.save(tmp_path / "edit.safetensors")
    answer = lm.answer(FACTS[0].text, FACTS[0].target_new)

    def loss() -> float:
        log_p = lm.logits([answer.input_ids])[0, list(answer.positions)].log_softmax(-1)
        return -log_p.gather(1, torch.tensor(answer.target_ids)[:, None]).mean().item()

    before = loss()
    assert before == pytest.approx(losses[0], abs=1e-5)
    with Edit.load(tmp_path / "edit.safetensors", lm).applied(lm):
        assert loss() < 0.7 * before
    assert loss() == before


def test_same_seed_same_edit(tiny_llama: EditableLM) -> None:
    one, two, three = (lora(tiny_llama, FACTS[:1], hparams=HPARAMS, seed=seed) for seed in (1, 1, 2))
    pairs = list(zip(one.modules, two.modules, three.modules, strict=True))
    assert all(torch.equal(a.delta.left, b.delta.left) for a, b, _ in pairs)
    assert not any(torch.equal(a.delta.left, c.delta.left) for a, _, c in pairs)


def test_factors_of_a_half_precision_model_are_float32(build_lm: Callable[..., EditableLM]) -> None:
    half = EditableLM(build_lm("llama").model.to(torch.bfloat16), build_lm("llama").tokenizer)
    for kind in ("lora", "adalora"):
        edit = lora(half, FACTS[:1], hparams=dataclasses.replace(HPARAMS, lora_kind=kind))
        assert all(module.delta.left.dtype == torch.float32 for module in edit.modules)


def test_without_peft(tiny_llama: EditableLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rep-fast\[lora\]"'):
        lora(tiny_llama, FACTS[:1], hparams=HPARAMS)


def test_refusals(tiny_llama: EditableLM) -> None:
    with pytest.raises(LayerError, match="layer 5"):
        lora(tiny_llama, FACTS[:1], hparams=dataclasses.replace(HPARAMS, layers=(5,)))
    with pytest.raises(HparamError, match="lora_rank=0 must be positive"):
        LoraHparams(lora_rank=0)
    with pytest.raises(HparamError, match=r"lora_dropout=1\.0 is out of range"):
        LoraHparams(lora_dropout=1.0)
    with pytest.raises(HparamError, match="lora_kind must be one of adalora, lora"):
        editors.get("lora").hparams(tiny_llama, overrides={"lora_kind": "dora"})


def test_the_door_hands_on_the_seed(tiny_llama: EditableLM) -> None:
    hparams = editors.get("lora").hparams(tiny_llama, overrides={"lora_steps": 1})
    assert hparams.lora_kind == "adalora"
    edit = editors.get("lora")(tiny_llama, FACTS[:1], hparams=hparams, seed=4)
    assert edit.method == "lora"
    assert edit.notes["seed"] == 4
