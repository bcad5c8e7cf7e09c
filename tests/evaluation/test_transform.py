"""PRUNE and RECT of a group's accumulated update: what is asked about, and what the next edit is made on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from example_cases import PROTOCOL, TEXT, make_cases, random_edit, without_times

from rep_fast.edits import accumulate, prune, rect
from rep_fast.errors import HparamError, RunMismatchError
from rep_fast.evaluation import Regime, Transform, evaluate_regime


def evaluate(lm, name, *, regime="sequential", every=None, protocol=PROTOCOL, **options):
    seen = []

    def write(step, seed, active):
        assert [handle.edit for handle in lm.active_edits] == list(active)
        made = random_edit(lm, step[0], seed + 7 * len(active), size=2.0)
        seen.append(made)
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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prune:1.2", lambda edit, lm: prune(edit, lm, base=1.2)),
        ("rect:40", lambda edit, lm: rect(edit, lm, share=0.4)),
        ("rect", lambda edit, lm: rect(edit, lm, share=0.2)),
    ],
)
def test_the_sum_is_asked_about_after_the_transform(tiny_llama64, tmp_path, name, change):
    lm = tiny_llama64
    summary, made = evaluate(lm, name, every=1, out_dir=tmp_path / "run")
    assert lm.active_edits == []
    assert len(made) == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    for n_edits in (1, 2, 3):
        with change(accumulate(made[:n_edits]), lm).applied(lm):
            wanted = success_nll(lm, make_cases(3)[0])
        (line,) = (line for line in lines if (line["case_id"], line["n_edits"]) == (10, n_edits))
        assert line["scores"]["success"]["new"][0]["nll"] == pytest.approx(wanted, rel=1e-9)
    assert summary.label.endswith(f"their sum transformed by {name}")


@pytest.mark.parametrize("mode", ["hook", "merge"])
def test_edits_after_a_checkpoint_are_made_on_the_untransformed_ones(build_lm, mode):
    """Keeping every entry changes nothing, whether groups are asked about on their way or not."""
    lm = build_lm("llama", dtype=torch.float64)
    protocol = dataclasses.replace(PROTOCOL, mode=mode)
    clean = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    plain, _ = evaluate(lm, None, every=1, protocol=protocol)
    kept, _ = evaluate(lm, "rect:100", every=1, protocol=protocol)
    for name, cell in plain["random"].items():
        assert kept["random"][name].mean == pytest.approx(cell.mean, abs=1e-9)
    assert all(torch.equal(clean[name], tensor) for name, tensor in lm.model.state_dict().items())


def test_a_run_belongs_to_its_transform(tiny_llama64, tmp_path):
    first, _ = evaluate(tiny_llama64, "rect:40", out_dir=tmp_path / "run")
    results = tmp_path / "run" / "results.jsonl"
    results.write_text(results.read_text().splitlines()[0] + "\n")
    again, _ = evaluate(tiny_llama64, "rect:40", out_dir=tmp_path / "run", resume=True)
    assert without_times(again) == without_times(first)
    with pytest.raises(RunMismatchError, match=" transform="):
        evaluate(tiny_llama64, None, out_dir=tmp_path / "run", resume=True)


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
