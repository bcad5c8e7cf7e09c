"""PRUNE of a group's accumulated update, RECT of each: what is asked about, and what the next edit is made on."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from example_cases import LAYER, PROTOCOL, TEXT, make_cases, random_edit, without_times

from rep_fast.edits import Codebook, Dense, Edit, ModuleEdit, accumulate, rect
from rep_fast.errors import HparamError, RunMismatchError
from rep_fast.evaluation import Regime, Summary, Transform, evaluate_regime


def evaluate(lm, name, *, regime="sequential", every=None, protocol=PROTOCOL, stood_on=None, **options):
    """A run, and its edits as they were made; `stood_on` takes what each was made on."""
    seen = []

    def write(step, seed, active):
        assert [handle.edit for handle in lm.active_edits] == list(active)
        made = random_edit(lm, step[0], seed + 7 * len(active), size=2.0)
        seen.append(made)
        if stood_on is not None:
            stood_on.append(active)
        return made

    summary = evaluate_regime(
        lm, make_cases(3), {"random": write}, regime=Regime.parse(regime, evaluate_every=every), seeds=(0,), text=TEXT,
        protocol=protocol, transform=None if name is None else Transform.parse(name), **options
    )  # fmt: skip
    return summary, seen


def success_nll(lm, case):
    answer = lm.answer(case.fact.text, case.fact.target_new)
    with torch.no_grad():
        logits = lm.logits([list(answer.input_ids)])[0, list(answer.positions)]
    return -float(logits.log_softmax(-1)[range(answer.n_targets), list(answer.target_ids)].mean())


def nll_after(directory, n_edits):
    """Of the first record's answer, as the run found it after so many edits."""
    lines = [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if (line["case_id"], line["n_edits"]) == (10, n_edits))
    return line["scores"]["success"]["new"][0]["nll"]


def dense(edit):
    return edit.modules[0].delta.to_dense()


def of_change(edit, change):
    return dataclasses.replace(edit, modules=(ModuleEdit(LAYER, Dense(change)),))


def test_the_pruned_sum_is_asked_about(tiny_llama64, tmp_path):
    """Values of the sum's singular value decomposition, bounded by hand: σ + log_1.2(s/σ) above σ."""
    lm, bounded = tiny_llama64, []
    summary, made = evaluate(lm, "prune:1.2", every=1, out_dir=tmp_path / "run")
    assert lm.active_edits == []
    sigma = torch.linalg.svdvals(lm.linear_weight(LAYER, "down").detach())[0]
    for n_edits in (1, 2, 3):
        u, s, vh = torch.linalg.svd(sum(dense(edit) for edit in made[:n_edits]), full_matrices=False)
        above = s > sigma
        bounded.append(int(above.sum()))
        s[above] = sigma + (s[above] / sigma).log() / math.log(1.2)
        with of_change(made[0], u * s @ vh).applied(lm):
            wanted = success_nll(lm, make_cases(3)[0])
        assert nll_after(tmp_path / "run", n_edits) == pytest.approx(wanted, rel=1e-9)
    assert bounded == [1, 2, 3]
    assert summary.label.endswith(", their sum transformed by prune:1.2")


@pytest.mark.parametrize("mode", ["hook", "merge"])
@pytest.mark.parametrize(("name", "share"), [("rect:40", 0.4), ("rect", 0.2)])
def test_every_update_is_rectified_before_the_next_is_made(build_lm, tmp_path, mode, name, share):
    """§5.12: RECT is of one update; of the sum it would keep other entries."""
    lm = build_lm("llama", dtype=torch.float64)
    clean = {key: tensor.clone() for key, tensor in lm.model.state_dict().items()}
    protocol, stood_on = dataclasses.replace(PROTOCOL, mode=mode), []
    summary, made = evaluate(lm, name, every=1, protocol=protocol, out_dir=tmp_path / "run", stood_on=stood_on)
    assert all(torch.equal(clean[key], tensor) for key, tensor in lm.model.state_dict().items())
    by_hand = [dense(rect(edit, lm, share=share)) for edit in made]
    assert [len(active) for active in stood_on] == [0, 1, 2]
    for active in stood_on:
        assert all(torch.equal(dense(edit), wanted) for edit, wanted in zip(active, by_hand, strict=False))
    for n_edits in (1, 2, 3):
        with of_change(made[0], sum(by_hand[:n_edits])).applied(lm):
            wanted = success_nll(lm, make_cases(3)[0])
        assert nll_after(tmp_path / "run", n_edits) == pytest.approx(wanted, rel=1e-9)
    assert not torch.allclose(sum(by_hand), dense(rect(accumulate(made), lm, share=share)))
    assert summary.label.endswith(f", each update transformed by {name}")


def test_a_stack_is_rectified_edit_by_edit(tiny_llama64):
    lm = tiny_llama64
    edits = [random_edit(lm, case, 0) for case in make_cases(2)]
    made = Transform.parse("rect:40")(edits, lm)
    assert torch.equal(dense(made), sum(dense(rect(edit, lm, share=0.4)) for edit in edits))
    assert made.notes["transform"] == "rect:40"


@pytest.mark.parametrize("name", ["prune", "rect"])
def test_an_edit_that_changes_no_weight_is_refused(tiny_llama64, name):
    """GRACE and WISE replace outputs; a transform would do nothing but name the run."""
    lm = tiny_llama64
    keys, values = torch.ones(1, lm.key_width(LAYER)), torch.ones(1, lm.hidden_size)
    book = ModuleEdit(LAYER, replacement=Codebook(keys, values, labels=("Antarctica",), radii=(1.0,)))
    edit = Edit(facts=(), method="grace", hparams={}, fingerprint=lm.fingerprint, modules=(book,))
    message = f"transform '{name}' works on changes of weights and 'grace' makes none; leave the transform or the"
    with pytest.raises(HparamError, match=message):
        Transform.parse(name)([edit], lm)
    with pytest.raises(HparamError, match=message):
        evaluate_regime(
            lm, make_cases(1), {"grace": lambda step, seed, active: edit}, regime=Regime.single(), seeds=(0,),
            text=TEXT, protocol=PROTOCOL, transform=Transform.parse(name),
        )  # fmt: skip
    assert lm.active_edits == []


@pytest.mark.parametrize("mode", ["hook", "merge"])
def test_edits_after_a_checkpoint_of_sums_are_made_on_the_untransformed_ones(build_lm, mode):
    lm = build_lm("llama", dtype=torch.float64)
    protocol, stood_on = dataclasses.replace(PROTOCOL, mode=mode), []
    clean = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    _, made = evaluate(lm, "prune:1.2", every=1, protocol=protocol, stood_on=stood_on)
    assert [len(active) for active in stood_on] == [0, 1, 2]
    for active in stood_on:
        assert all(torch.equal(dense(edit), dense(raw)) for edit, raw in zip(active, made, strict=False))
    assert all(torch.equal(clean[name], tensor) for name, tensor in lm.model.state_dict().items())


def test_a_run_belongs_to_its_transform(tiny_llama64, tmp_path):
    first, _ = evaluate(tiny_llama64, "rect:40", out_dir=tmp_path / "run")
    results = tmp_path / "run" / "results.jsonl"
    results.write_text(results.read_text().splitlines()[0] + "\n")
    again, _ = evaluate(tiny_llama64, "rect:40", out_dir=tmp_path / "run", resume=True)
    assert without_times(again) == without_times(first)
    with pytest.raises(RunMismatchError, match=" transform="):
        evaluate(tiny_llama64, None, out_dir=tmp_path / "run", resume=True)


def test_a_run_that_took_rect_of_the_sum_does_not_go_on_with_each_update(tiny_llama64, tmp_path):
    first, _ = evaluate(tiny_llama64, "rect:40", out_dir=tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings.pop("transform_of_each") is True
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(RunMismatchError, match=" transform_of_each="):
        evaluate(tiny_llama64, "rect:40", out_dir=tmp_path / "run", resume=True)
    assert Summary.of([], settings=first.settings | {"transform_of_each": None}).label.count("their sum") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shrink", "transform 'shrink' is unknown; write prune, prune:1.2, rect or rect:40"),
        ("rect:x", "is unknown"),
        ("prune:1", "base must be above 1"),
        ("rect:0", "keep more than 0 and up to 100 percent"),
        ("rect:101", "keep more than 0 and up to 100 percent"),
    ],
)
def test_unknown_transforms_are_refused(name, message):
    with pytest.raises(HparamError, match=message):
        Transform.parse(name)
