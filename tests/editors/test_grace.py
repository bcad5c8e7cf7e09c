"""GRACE on tiny random models: the trajectory of a plain loop, an exact edit, sequences, and what it refuses."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rep_fast import editors
from rep_fast.editors import GraceHparams
from rep_fast.edits import Codebook, Edit
from rep_fast.errors import HparamError, LayerError, NothingToEditError
from rep_fast.evaluation import score_targets
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site
from rep_fast.presets import load_preset

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica and Asia", "Europe")
OTHER = Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean", "French")
SHORT = Fact("{} belongs to the continent of", "Slovenia", "the", "Europe")  # one token
HPARAMS = GraceHparams(layer=1, n_iter=6, edit_lr=0.5)


def book_of(edit: Edit) -> Codebook:
    (module,) = edit.modules
    assert isinstance(module.replacement, Codebook)
    return module.replacement


def plain_value(lm: EditableLM, fact: Fact, hparams: GraceHparams, *, seed: int) -> tuple[Tensor, Tensor]:
    """Key and value by the definition: hooks on the module, the model called as a whole, one row."""
    answer = lm.answer(fact.text, fact.target_new)
    ids, last = torch.tensor([answer.input_ids]), len(answer.prompt_ids) - 1
    module: nn.Module = lm.linear(hparams.layer, hparams.linear)
    kept: dict[str, Tensor] = {}
    handle = module.register_forward_hook(
        lambda _, args, output: kept.update(key=args[0][0, last], out=output[0, last])
    )
    lm.model(ids)
    handle.remove()
    start = torch.rand(kept["out"].shape, generator=torch.Generator().manual_seed(seed)).double()
    value = nn.Parameter((kept["out"].detach() if hparams.val_init == "warm" else start).clone())
    optimiser = torch.optim.Adam([value], lr=hparams.edit_lr)

    def put(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        for token in range(output.shape[1]):
            is_wanted = {
                "replace_last": token == last, "replace_prompt": token <= last, "replace_all": True
            }[hparams.replacement]  # fmt: skip
            if is_wanted:
                changed[0, token] = value
        return changed

    handle = module.register_forward_hook(put)
    for _ in range(hparams.n_iter):
        logits = lm.model(ids).logits[0]
        loss = sum(
            (-logits[p].log_softmax(-1)[t] for p, t in zip(answer.positions, answer.target_ids, strict=True)),
            start=torch.zeros(()),
        ) / len(answer.target_ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    handle.remove()
    lm.model.zero_grad()
    return kept["key"].detach(), value.detach()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"val_init": "warm", "replacement": "replace_prompt"},
        {"replacement": "replace_all", "linear": "up"},
    ],
)
def test_the_value_follows_a_plain_loop(fresh_lm: EditableLM, changes: dict[str, Any]) -> None:
    lm, hparams = fresh_lm, dataclasses.replace(HPARAMS, **changes)
    book = book_of(editors.get("grace")(lm, [FACT], hparams=hparams, seed=3))
    key, value = plain_value(lm, FACT, hparams, seed=3)
    torch.testing.assert_close(book.keys[0], key, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(book.values[0], value, rtol=1e-7, atol=1e-7)
    assert (book.labels, book.radii, book.extent) == (("Antarctica and Asia",), (1.0,), hparams.replacement)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_an_edit_holds_on_its_prompt_and_touches_nothing_else(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    hparams = dataclasses.replace(HPARAMS, n_iter=60, edit_lr=1.0, eps=0.3)
    edit = editors.get("grace")(lm, [SHORT], hparams=hparams)
    elsewhere = [(OTHER.text, OTHER.target_true), (SHORT.text + " Europe and the", "Asia")]
    clean = score_targets(lm, elsewhere)
    with edit.applied(lm):
        (hit,) = score_targets(lm, [(SHORT.text, SHORT.target_new)])
        assert hit.exact_match
        assert hit.nll == pytest.approx(edit.notes["loss_last"][0], rel=1e-9)
        assert score_targets(lm, elsewhere) == clean
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def test_early_stop_keeps_the_value_of_the_last_loss(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    hparams = dataclasses.replace(HPARAMS, n_iter=80, edit_lr=1.0)
    whole = editors.get("grace")(lm, [SHORT], hparams=hparams)
    halfway = (whole.notes["loss_first"][0] + whole.notes["loss_last"][0]) / 2
    stopped = editors.get("grace")(lm, [SHORT], hparams=dataclasses.replace(hparams, early_stop=halfway))
    steps = stopped.notes["forwards"][0]
    assert whole.notes["forwards"] == [81] > [steps]
    assert stopped.notes["loss_last"][0] < halfway
    cut = editors.get("grace")(lm, [SHORT], hparams=dataclasses.replace(hparams, n_iter=steps - 1))
    assert torch.equal(book_of(cut).values, book_of(stopped).values)


def test_facts_together_or_one_after_another(build_lm: Callable[..., EditableLM]) -> None:
    """An earlier edit of the module does not change a later one; the same prompt again takes its place."""
    lm = build_lm("gpt2", dtype=torch.float64)
    grace = editors.get("grace")
    hparams = dataclasses.replace(HPARAMS, eps=0.2, n_iter=60, edit_lr=1.0)
    together = book_of(grace(lm, [SHORT, OTHER], hparams=hparams, seed=5))
    first = grace(lm, [SHORT], hparams=hparams, seed=5)
    again = dataclasses.replace(SHORT, target_new="is")
    with first.applied(lm):
        second = grace(lm, [OTHER], hparams=hparams, seed=6)
        stacked = Codebook.stacked([book_of(first), book_of(second)])
        torch.testing.assert_close(stacked.values, together.values, rtol=1e-9, atol=1e-9)
        assert torch.equal(stacked.reach, together.reach)
        with grace(lm, [again], hparams=hparams).applied(lm):
            assert score_targets(lm, [(SHORT.text, "is")])[0].exact_match
        assert score_targets(lm, [(SHORT.text, SHORT.target_new)])[0].exact_match


@pytest.mark.parametrize("together", [True, False])
def test_an_absorbed_fact_is_answered_by_a_value_that_goes_on_from_the_first(
    build_lm: Callable[..., EditableLM], together: bool
) -> None:
    lm, grace = build_lm("llama", dtype=torch.float64), editors.get("grace")
    near = Fact("The mother tongue of {} is", "Danielle Darrieux", "the", "French")
    keys = [book_of(grace(lm, [fact], hparams=HPARAMS)).keys[0] for fact in (SHORT, near)]
    # beyond the first radius, yet within the sum of both
    hparams = dataclasses.replace(HPARAMS, eps=0.7 * float((keys[0] - keys[1]).norm()), n_iter=60, edit_lr=1.0)
    first = grace(lm, [SHORT], hparams=hparams)
    with first.applied(lm):
        second = grace(lm, [near], hparams=hparams)
    made = [grace(lm, [SHORT, near], hparams=hparams)] if together else [first, second]
    assert made[-1].notes["absorbed"] == ([1] if together else [0])
    assert first.notes["absorbed"] == []
    book = Codebook.stacked([book_of(edit) for edit in made])
    assert book.spoken_by.tolist() == [1, 1]
    assert [reach < 0 for reach in book.reach.tolist()] == [False, True]
    with contextlib.ExitStack() as stack:
        for edit in made:
            stack.enter_context(edit.applied(lm))
        (hit,) = score_targets(lm, [(near.text, near.target_new)])
    assert hit.exact_match
    assert hit.nll == pytest.approx(made[-1].notes["loss_last"][-1], rel=1e-9)
    # the first value, put at the second prompt, is where its training begins
    with lm.patch(Site("value", 1), lambda output: torch.cat([output[:, :-1], book.values[None, :1]], dim=1)):
        (start,) = score_targets(lm, [(near.text, near.target_new)])
    assert made[-1].notes["loss_first"][-1] == pytest.approx(start.nll, rel=1e-9)


def test_the_seed_draws_the_start(tiny_llama64: EditableLM) -> None:
    grace = editors.get("grace")
    one, same, other = (book_of(grace(tiny_llama64, [FACT], hparams=HPARAMS, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.values, same.values)
    assert not torch.equal(one.values, other.values)


def test_presets_are_the_published_ones() -> None:
    """methods §1 and §5.13."""
    preset = load_preset("default")
    found = {family: preset.section("grace", family=family) for family in ("llama", "gptj", "gpt2", "qwen2")}
    assert [(found[f]["layer"], found[f]["n_iter"]) for f in found] == [(27, 50), (25, 200), (35, 200), (18, 50)]
    assert found["gpt2"]["linear"] == "up"
    assert (GraceHparams(1).eps, GraceHparams(1).edit_lr, GraceHparams(1).val_init) == (1.0, 1.0, "cold")


def test_a_target_the_model_already_says(tiny_llama64: EditableLM) -> None:
    lm = tiny_llama64
    (target,) = lm.answer(SHORT.text, SHORT.target_new).target_ids
    wanted = 50 * nn.functional.normalize(lm.head.weight[target].detach(), dim=0)
    with (
        lm.patch(Site("hidden", 2), lambda hidden: hidden * 0 + wanted),
        pytest.raises(NothingToEditError, match="already answers 'Slovenia belongs to the continent of' with 'the'"),
    ):
        editors.get("grace")(lm, [SHORT], hparams=HPARAMS)


def test_refusals(tiny_gpt2: EditableLM) -> None:
    grace = editors.get("grace")
    with pytest.raises(LayerError, match="has no gate"):
        grace(tiny_gpt2, [FACT], hparams=dataclasses.replace(HPARAMS, linear="gate"))
    with pytest.raises(LayerError, match="layer 9"):
        grace(tiny_gpt2, [FACT], hparams=dataclasses.replace(HPARAMS, layer=9))
    with pytest.raises(HparamError, match="output of down, up, gate, not of linear='q'"):
        GraceHparams(layer=1, linear="q")
    with pytest.raises(HparamError, match="replacement='replace_first' is unknown"):
        GraceHparams(layer=1, replacement="replace_first")  # type: ignore[arg-type]
    with pytest.raises(HparamError, match=r"n_iter=0, eps=1\.0"):
        GraceHparams(layer=1, n_iter=0)
    with pytest.raises(HparamError, match="needs at least one fact"):
        grace(tiny_gpt2, [], hparams=HPARAMS)
