"""WISE on tiny random models: loss and trajectory against plain loops, sequences of edits, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rep_fast import editors
from rep_fast.editors import WiseHparams
from rep_fast.editors.wise import gather, memory_loss, train_memory, trainable_entries
from rep_fast.edits import Edit, SideMemory
from rep_fast.errors import HparamError, LayerError, NothingToEditError
from rep_fast.evaluation import score_targets
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site
from rep_fast.presets import load_preset

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica and Asia", "Europe")
OTHER = Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean", "French")
SHORT = Fact("{} belongs to the continent of", "Slovenia", "the", "Europe")  # one token
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went home. {}")
HPARAMS = WiseHparams(
    layer=1, n_iter=5, edit_lr=0.05, weight_decay=0.01, alpha=0.3, beta=2.0, gamma=1.0, mask_ratio=0.5
)


def memory_of(edit: Edit) -> SideMemory:
    (module,) = edit.modules
    assert isinstance(module.replacement, SideMemory)
    return module.replacement


def wise(lm: EditableLM, facts: list[Fact], hparams: WiseHparams = HPARAMS, seed: int = 0) -> Edit:
    return editors.get("wise")(lm, facts, hparams=hparams, templates=TEMPLATES, seed=seed)


def plain_act(lm: EditableLM, value: Tensor) -> Tensor:
    if lm.activation == "silu":
        return nn.functional.silu(value)
    return nn.functional.gelu(value, approximate="tanh")


def plain_loss(lm: EditableLM, fact: Fact, change: Tensor, hparams: WiseHparams) -> Tensor:
    """Row by row and token by token, the model called as a whole with W' in the place of W."""
    losses, inside, outside = [], [], []
    for template in TEMPLATES:
        prompt = template.replace("{}", fact.prompt)
        answer = lm.answer(prompt.replace("{}", fact.subject), fact.target_new)
        kept: list[Tensor] = []

        def swap(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, kept: list[Tensor] = kept) -> Tensor:
            side = output + args[0] @ change.T
            kept.append((plain_act(lm, output) - plain_act(lm, side)).norm(dim=-1)[0])
            return side

        handle = lm.linear(hparams.layer, "down").register_forward_hook(swap)
        logits = lm.model(torch.tensor([answer.input_ids])).logits[0]
        handle.remove()
        losses += [-logits[p].log_softmax(-1)[t] for p, t in zip(answer.positions, answer.target_ids, strict=True)]
        first, last = (lm.locate(prompt, fact.subject, strategy=f"subject_{end}").position for end in ("first", "last"))
        gaps = kept[0][: len(answer.prompt_ids)]
        inside.append(gaps[first : last + 1].mean())
        outside.append(torch.cat([gaps[:first], gaps[last + 1 :]]).mean())
    total = sum(losses, start=torch.zeros(())) / len(losses)
    for excess in (
        [out - hparams.alpha for out in outside],
        [hparams.beta - into for into in inside],
        [hparams.gamma - into + out for into, out in zip(inside, outside, strict=True)],
    ):
        positive = [value for value in excess if value > 0]
        total = total + (sum(positive, start=torch.zeros(())) / len(positive) if positive else 0)
    return total


def test_the_loss_is_its_definition(tiny_lm64: EditableLM) -> None:
    lm = tiny_lm64
    examples = gather(lm, FACT, HPARAMS, TEMPLATES)
    for size in (0.01, 0.3):
        change = size * torch.randn(lm.linear_shape(1, "down"), generator=torch.Generator().manual_seed(1)).double()
        mine, plain = change.clone().requires_grad_(), change.clone().requires_grad_()
        loss, expected = memory_loss(lm, examples, mine, HPARAMS), plain_loss(lm, FACT, plain, HPARAMS)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        gradients = torch.autograd.grad(loss, [mine])[0], torch.autograd.grad(expected, [plain])[0]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_training_is_masked_clamped_descent(tiny_llama64: EditableLM) -> None:
    lm, hparams = tiny_llama64, dataclasses.replace(HPARAMS, edit_lr=0.5, norm_constraint=0.2)
    change = torch.zeros(lm.linear_shape(1, "down"), dtype=torch.float64)
    mask = trainable_entries(change, 0.5, seed=4, number=1)
    assert float(mask.double().mean()) == pytest.approx(0.5, abs=0.05)
    found, losses = train_memory(lm, gather(lm, FACT, hparams, TEMPLATES), change, mask, hparams)
    expected = []
    for _ in range(hparams.n_iter + 1):
        leaf = change.clone().requires_grad_()
        loss = plain_loss(lm, FACT, leaf, hparams)
        expected.append(float(loss.detach()))
        step = torch.autograd.grad(loss, [leaf])[0] + hparams.weight_decay * (lm.linear_weight(1, "down") + change)
        last = change
        change = (change - hparams.edit_lr * step * mask).clamp(-0.2, 0.2).detach()
    assert losses == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(found, last, rtol=1e-6, atol=1e-9)
    assert bool((found.abs() == 0.2).any())
    assert not bool(found[~mask].any())


def test_training_stops_where_the_loss_is_small_and_still(tiny_llama64: EditableLM) -> None:
    hparams = dataclasses.replace(HPARAMS, n_iter=50, stop_loss=1e9, stop_change=1e9)
    examples = gather(tiny_llama64, FACT, hparams, TEMPLATES)
    start = torch.zeros(tiny_llama64.linear_shape(1, "down"), dtype=torch.float64)
    mask = torch.ones_like(start, dtype=torch.bool)
    assert len(train_memory(tiny_llama64, examples, start, mask, hparams)[1]) == 2
    for changes in ({"stop_loss": 0.0}, {"stop_change": 0.0}):
        never = dataclasses.replace(hparams, n_iter=3, **changes)
        assert len(train_memory(tiny_llama64, examples, start, mask, never)[1]) == 4


def test_the_threshold_is_what_routing_measures(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    hparams = dataclasses.replace(HPARAMS, n_iter=60, edit_lr=0.2, weight_decay=0.0, mask_ratio=1.0)
    edit = wise(lm, [SHORT], hparams)
    memory = memory_of(edit)

    def gap_of(text: str) -> float:
        kept = lm.read([text], [("key", 1), ("value", 1)])
        key, value = (tensor[0].detach() for tensor in kept.values())
        side = value + key @ memory.changes[0].T
        return float((plain_act(lm, value) - plain_act(lm, side)).norm(dim=-1).mean())

    gaps = [gap_of(template.replace("{}", SHORT.text)) for template in TEMPLATES]
    assert memory.gaps[0] == pytest.approx(min(gaps), rel=1e-9)
    with edit.applied(lm):
        assert score_targets(lm, [(SHORT.text, SHORT.target_new)])[0].exact_match
    # another prompt goes through the memory exactly when its own gap reaches the threshold
    far = [(OTHER.text, OTHER.target_true)]
    clean = score_targets(lm, far)
    for share, is_routed in ((0.99, True), (1.01, False)):
        rules = dataclasses.replace(memory.rules, act_ratio=share * gap_of(OTHER.text) / memory.gaps[0])
        module = dataclasses.replace(edit.modules[0], replacement=dataclasses.replace(memory, rules=rules))
        with dataclasses.replace(edit, modules=(module,)).applied(lm):
            assert (score_targets(lm, far) != clean) == is_routed


def test_edits_in_sequence_fill_one_memory_as_one_call_does(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("gpt2", dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    facts = [FACT, OTHER, dataclasses.replace(FACT, subject="Microsoft", target_new="Los Angeles")]
    hparams = dataclasses.replace(HPARAMS, save_freq=2, merge_freq=4)
    together = memory_of(wise(lm, facts, hparams))
    assert together.counts == (2, 1)
    handles, made = [], []
    for fact in facts:
        made.append(wise(lm, [fact], hparams))
        handles.append(made[-1].apply(lm))
    for handle in handles:
        handle.undo()
    stacked = SideMemory.stacked([memory_of(edit) for edit in made])
    torch.testing.assert_close(stacked.changes, together.changes, rtol=1e-7, atol=1e-9)
    assert stacked.gaps == pytest.approx(together.gaps, rel=1e-7)
    assert stacked.counts == together.counts
    # the second memory has a mask of its own
    assert not torch.equal(together.changes[0] != 0, together.changes[1] != 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def test_the_seed_draws_the_mask(tiny_llama64: EditableLM) -> None:
    one, same, other = (memory_of(wise(tiny_llama64, [FACT], seed=seed)).changes for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one != 0, other != 0)


def test_presets_are_the_published_ones() -> None:
    """methods §1 and §5.14."""
    preset = load_preset("default")
    assert preset.section("wise", family="llama")["layer"] == 27
    gptj = preset.section("wise", family="gptj")
    assert (gptj["layer"], gptj["alpha"], gptj["beta"], gptj["gamma"]) == (21, 15, 40, 20)
    assert preset.section("wise", family="gpt2")["n_iter"] == 40
    plain = WiseHparams(1)
    assert (plain.n_iter, plain.edit_lr, plain.alpha, plain.beta, plain.gamma) == (70, 1.0, 5, 20, 10)
    assert (plain.act_ratio, plain.save_freq, plain.merge_freq, plain.density) == (0.88, 500, 1000, 0.53)


def test_a_target_the_model_already_says(tiny_llama64: EditableLM) -> None:
    lm = tiny_llama64
    (target,) = lm.answer(SHORT.text, SHORT.target_new).target_ids
    wanted = 50 * nn.functional.normalize(lm.head.weight[target].detach(), dim=0)
    with (
        lm.patch(Site("hidden", 2), lambda hidden: hidden * 0 + wanted),
        pytest.raises(NothingToEditError, match="already answers 'Slovenia belongs to the continent of' with 'the'"),
    ):
        wise(lm, [SHORT])


def test_refusals(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    with pytest.raises(LayerError, match="layer 9"):
        wise(lm, [FACT], dataclasses.replace(HPARAMS, layer=9))
    with pytest.raises(HparamError, match=r"mask_ratio=1\.5 of WISE must be positive, the last at most 1"):
        WiseHparams(layer=1, mask_ratio=1.5)
    with wise(lm, [FACT]).applied(lm):
        with pytest.raises(HparamError, match="follow one rule"):
            wise(lm, [OTHER], dataclasses.replace(HPARAMS, act_ratio=0.5))
        with pytest.raises(LayerError, match="undo that edit first"):
            wise(lm, [OTHER], dataclasses.replace(HPARAMS, layer=0))
