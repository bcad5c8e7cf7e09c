"""Stacked regimes: what each edit sees, what is scored, what is left behind, and how a killed run goes on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from example_cases import PROTOCOL, TEXT, make_cases, random_edit, without_times

from rep_fast.errors import CorruptFileError, HparamError, NothingToEditError, RunMismatchError
from rep_fast.evaluation import Protocol, Regime, case_questions, evaluate_regime, evaluate_single, perturb_case

N_CASES = 5


def writer(lm, *, calls=None, refuse=()):
    """A column whose edit depends on the step's records, the seed and the edits that are active."""

    def write(cases, seed, active):
        if calls is not None:
            calls.append(tuple(case.case_id for case in cases))
        if any(case.case_id in refuse for case in cases):
            raise NothingToEditError("the target already is the answer")
        assert [handle.edit for handle in lm.active_edits] == list(active)
        made = random_edit(lm, cases[0], seed + 7 * len(active), size=2.0)
        return dataclasses.replace(made, facts=tuple(case.fact for case in cases))

    return write


def evaluate(lm, regime, *, n=N_CASES, columns=None, evaluate_every=None, **options):
    regime = Regime.parse(regime, evaluate_every=evaluate_every)
    options = {"seeds": (0,), "text": TEXT, "protocol": PROTOCOL, **options}
    return evaluate_regime(lm, make_cases(n), columns or {"random": writer(lm)}, regime=regime, **options)


def lines_of(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


def scored_alone(lm, case, seed):
    """NLL of every question of a case, one forward each, on the model as it stands."""
    found = {}
    for item in case_questions(case, perturb_case(lm, case, text=TEXT, seed=seed, protocol=PROTOCOL)):
        answer = lm.answer(item.question.prompt, item.question.target)
        with torch.no_grad():
            logits = lm.logits([list(answer.input_ids)])[0, list(answer.positions)]
        picked = logits.log_softmax(-1)[range(len(answer.target_ids)), list(answer.target_ids)]
        found.setdefault((item.group, item.role), []).append(-float(picked.mean()))
    return found


@pytest.mark.parametrize(
    ("regime", "stacks"),
    [
        # the steps on the model, by case_id, when each group is evaluated
        ("single", [[[10]], [[11]], [[12]], [[13]], [[14]]]),
        ("batch:2", [[[10, 11]], [[12, 13]], [[14]]]),
        ("sequential:3", [[[10], [11], [12]], [[13], [14]]]),
        ("cumulative:2", [[[10, 11], [12, 13], [14]]]),
        ("joint-epochs", [[[10, 11, 12, 13, 14]]]),
    ],
)
def test_records_are_scored_with_all_edits_of_their_group(tiny_llama64, tmp_path, regime, stacks):
    lm, calls, cases = tiny_llama64, [], {case.case_id: case for case in make_cases(N_CASES)}
    evaluate(lm, regime, columns={"random": writer(lm, calls=calls)}, out_dir=tmp_path / "run")
    assert calls == [tuple(step) for steps in stacks for step in steps]
    stored = {line["case_id"]: line for line in lines_of(tmp_path / "run")}
    assert len(stored) == N_CASES
    for steps in stacks:
        handles, active = [], []
        for step in steps:
            active.append(writer(lm)([cases[case_id] for case_id in step], 0, tuple(active)))
            handles.append(active[-1].apply(lm))
        for case_id in (case_id for step in steps for case_id in step):
            line = stored[case_id]
            assert (line["regime"], line["n_edits"]) == (regime, sum(map(len, steps)))
            for (group, role), wanted in scored_alone(lm, cases[case_id], 0).items():
                found = [prompt["nll"] for prompt in line["scores"][group][role]]
                assert found == pytest.approx(wanted, rel=1e-9)
        for handle in handles:
            handle.undo()


@pytest.mark.parametrize("mode", ["hook", "merge"])
@pytest.mark.parametrize("regime", ["batch:2", "sequential:2", "cumulative:2"])
def test_every_group_begins_and_ends_on_the_clean_model(build_lm, regime, mode):
    lm = build_lm("gpt2")
    clean = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}

    def write(cases, seed, active):
        state = lm.model.state_dict()
        is_clean = all(torch.equal(clean[name], state[name]) for name in clean)
        assert is_clean == (not active or mode == "hook")
        return writer(lm)(cases, seed, active)

    protocol = Protocol(n_words=8, long_in=1, long_out=1, mode=mode)
    evaluate(lm, regime, columns={"first": write, "second": write}, protocol=protocol, seeds=(0, 1))
    assert all(torch.equal(clean[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert lm.active_edits == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_the_model_is_clean_after_a_column_breaks(build_lm):
    lm = build_lm("llama")

    def broken(cases, seed, active):
        if active:
            raise ZeroDivisionError
        return writer(lm)(cases, seed, active)

    with pytest.raises(ZeroDivisionError):
        evaluate(lm, "sequential:3", columns={"broken": broken})
    assert lm.active_edits == []


def test_the_protocol_says_how_edits_are_applied(tiny_llama64):
    lm, seen = tiny_llama64, []

    def write(cases, seed, active):
        seen.extend((handle.mode, handle.compose) for handle in lm.active_edits)
        return writer(lm)(cases, seed, active)

    protocol = dataclasses.replace(PROTOCOL, compose="sum")
    evaluate(lm, "sequential:2", n=2, columns={"random": write}, protocol=protocol)
    assert seen == [("hook", "sum")]


def test_seeds_may_order_the_records(tiny_llama64):
    lm, orders = tiny_llama64, []
    protocol = dataclasses.replace(PROTOCOL, record_order="seed")
    for _ in range(2):
        orders.append([])
        columns = {"random": writer(lm, calls=orders[-1])}
        evaluate(lm, "sequential:3", columns=columns, protocol=protocol, seeds=(0, 1))
    first, second = orders[0][:N_CASES], orders[0][N_CASES:]
    assert orders[0] == orders[1]
    assert sorted(first) == sorted(second) == [(10,), (11,), (12,), (13,), (14,)]
    assert first != second


def test_groups_of_one_are_the_single_regime(tiny_llama64):
    lm = tiny_llama64
    single = evaluate_single(
        lm, make_cases(), {"random": lambda case, seed: random_edit(lm, case, seed, size=2.0)}, seeds=(0, 1), text=TEXT,
        protocol=PROTOCOL,
    )  # fmt: skip
    for name in ("sequential:1", "batch:1"):
        assert evaluate(lm, name, n=3, seeds=(0, 1)).cells == single.cells


def test_checkpoints_ask_what_was_written_so_far(tiny_llama64, tmp_path):
    lm, cases = tiny_llama64, make_cases(N_CASES)
    summary = evaluate(lm, "sequential", evaluate_every=2, out_dir=tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    asked = {n: [line["case_id"] for line in lines if line["n_edits"] == n] for n in (2, 4, 5)}
    assert asked == {2: [10, 11], 4: [10, 11, 12, 13], 5: [10, 11, 12, 13, 14]}
    assert list(summary.checkpoints["random"]) == [2, 4, 5]
    assert summary.checkpoints["random"][5] == summary["random"]
    active = []
    for case in cases[:4]:
        active.append(writer(lm)([case], 0, tuple(active)))
        active[-1].apply(lm)
    wanted = scored_alone(lm, cases[1], 0)["success", "new"]
    while lm.active_edits:
        lm.active_edits[-1].undo()
    (found,) = (line for line in lines if (line["case_id"], line["n_edits"]) == (11, 4))
    assert found["scores"]["success"]["new"][0]["nll"] == pytest.approx(wanted[0], rel=1e-9)


@pytest.mark.parametrize(
    ("regime", "stop_after"),
    [
        *(("batch:2", count) for count in (1, 2, 3, 5, 8)),
        *(("sequential:3", count) for count in (1, 2, 7, 9, 10, 14)),
        *(("cumulative:2", count) for count in (1, 3, 4, 9, 14)),
    ],
)
def test_interrupted_run_resumes_without_repeating_an_edit(tiny_llama64, tmp_path, regime, stop_after):
    lm, whole_calls, calls = tiny_llama64, [], []
    every = None if regime.startswith("batch") else 1
    whole = evaluate(lm, regime, evaluate_every=every, columns={"random": writer(lm, calls=whole_calls)})

    def stop(done, total):
        if done == stop_after:
            raise KeyboardInterrupt

    columns = {"random": writer(lm, calls=calls)}
    options = {"evaluate_every": every, "columns": columns, "out_dir": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, regime, progress=stop, **options)
    assert lm.active_edits == []
    resumed = evaluate(lm, regime, resume=True, **options)
    assert without_times(resumed) == without_times(whole)
    assert calls == whole_calls
    keys = [(line["case_id"], line["n_edits"]) for line in lines_of(tmp_path / "run")]
    assert len(keys) == len(set(keys))
    assert not list((tmp_path / "run" / "edits").iterdir())


def test_a_kill_between_two_edits_keeps_the_first(tiny_llama64, tmp_path):
    lm, calls = tiny_llama64, []

    def killed(cases, seed, active):
        if active:
            raise KeyboardInterrupt
        return writer(lm, calls=calls)(cases, seed, active)

    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, "sequential:3", columns={"random": killed}, out_dir=tmp_path / "run")
    (stored,) = (tmp_path / "run" / "edits").rglob("*.safetensors")
    resumed = evaluate(
        lm, "sequential:3", columns={"random": writer(lm, calls=calls)}, out_dir=tmp_path / "run", resume=True
    )
    assert calls == [(10,), (11,), (12,), (13,), (14,)]
    assert without_times(resumed) == without_times(evaluate(lm, "sequential:3"))
    assert not stored.exists()


def test_a_damaged_edit_is_not_built_upon(tiny_llama64, tmp_path):
    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llama64, "sequential", out_dir=tmp_path / "run", progress=stop)
    stored = sorted((tmp_path / "run" / "edits").rglob("*.safetensors"))
    assert [path.name for path in stored] == ["000000.safetensors", "000001.safetensors"]
    stored[0].write_bytes(stored[0].read_bytes()[:-8])
    with pytest.raises(CorruptFileError, match=r"000000\.safetensors"):
        evaluate(tiny_llama64, "sequential", out_dir=tmp_path / "run", resume=True)
    assert tiny_llama64.active_edits == []


def test_edits_can_be_kept(tiny_llama64, tmp_path):
    evaluate(tiny_llama64, "sequential:3", out_dir=tmp_path / "run", keep_edits=True)
    stored = sorted(path.relative_to(tmp_path / "run" / "edits") for path in (tmp_path / "run").rglob("*.safetensors"))
    assert [str(path) for path in stored] == [
        *(f"seed0-column0-group0/00000{n}.safetensors" for n in range(3)),
        *(f"seed0-column0-group1/00000{n}.safetensors" for n in range(2)),
    ]
    again = evaluate(tiny_llama64, "sequential:3", out_dir=tmp_path / "run", resume=True, keep_edits=True)
    assert without_times(again) == without_times(evaluate(tiny_llama64, "sequential:3"))


@pytest.mark.parametrize("regime", ["sequential", "batch:3", "joint-epochs"])
def test_a_record_that_cannot_be_written_is_left_out(tiny_llama64, tmp_path, regime):
    lm, calls = tiny_llama64, []
    columns = {"random": writer(lm, calls=calls, refuse=(11,))}
    summary = evaluate(lm, regime, columns=columns, out_dir=tmp_path / "run")
    assert summary.failures["random"] == ("case 11, seed 0: the target already is the answer",)
    assert summary["random"]["success"].n == N_CASES - 1
    lines = {line["case_id"]: line for line in lines_of(tmp_path / "run")}
    assert len(lines) == N_CASES
    # the others are written together, without it
    written = {"sequential": (12,), "batch:3": (10, 12), "joint-epochs": (10, 12, 13, 14)}[regime]
    assert written in calls
    assert evaluate(lm, regime, columns=columns, out_dir=tmp_path / "run", resume=True).cells == summary.cells


def test_records_that_cannot_be_written_together_all_fail(tiny_llama64):
    def alone(cases, seed, active):
        if len(cases) > 1:
            raise NothingToEditError("too many at once")
        return writer(tiny_llama64)(cases, seed, active)

    summary = evaluate(tiny_llama64, "batch:5", columns={"random": alone})
    assert summary.failures["random"] == tuple(f"case {c}, seed 0: too many at once" for c in range(10, 15))
    assert "success" not in summary["random"]


def test_a_record_that_cannot_be_asked_is_not_written(tiny_gpt2_64):
    cases = make_cases(3)
    cases[1] = dataclasses.replace(cases[1], paraphrase_prompts=("word " * 400,))
    lm, calls = tiny_gpt2_64, []
    summary = evaluate_regime(
        lm, cases, {"random": writer(lm, calls=calls)}, regime=Regime.batch(3), seeds=(0,), protocol=PROTOCOL
    )
    assert calls == [(10, 12)]
    (failure,) = summary.failures["random"]
    assert failure.startswith("case 11, seed 0: ")


@pytest.mark.parametrize(("regime", "every", "total"), [("batch:2", None, 8), ("sequential:3", 1, 14)])
@pytest.mark.parametrize("refuse", [(), (11,)])
def test_progress_counts_edits_and_evaluations_to_the_total(tiny_llama64, regime, every, total, refuse):
    seen = []
    evaluate(
        tiny_llama64, regime, evaluate_every=every, columns={"random": writer(tiny_llama64, refuse=refuse)},
        progress=lambda done, of: seen.append((done, of)),
    )  # fmt: skip
    assert seen == [(n, total) for n in range(1, total + 1)]


def test_times_are_per_record(tiny_llama64, tmp_path):
    summary = evaluate(tiny_llama64, "batch:2", out_dir=tmp_path / "run")
    assert set(summary.seconds["random"]) == {"edit", "evaluation", "undo"}
    lines = lines_of(tmp_path / "run")
    assert lines[0]["seconds"]["edit"] == lines[1]["seconds"]["edit"] > 0
    assert ["undo" in line["seconds"] for line in lines] == [False, True, False, True, True]


def test_a_run_belongs_to_its_regime(tiny_llama64, tmp_path):
    evaluate(tiny_llama64, "sequential:2", out_dir=tmp_path / "run")
    with pytest.raises(RunMismatchError, match=' regime="sequential:2", this one has regime="batch:2"'):
        evaluate(tiny_llama64, "batch:2", out_dir=tmp_path / "run", resume=True)
    with pytest.raises(RunMismatchError, match=" evaluate_every="):
        evaluate(tiny_llama64, "sequential:2", evaluate_every=1, out_dir=tmp_path / "run", resume=True)


def test_what_stacked_regimes_cannot_do_is_refused(tiny_llama64):
    with pytest.raises(HparamError, match="regime 'sequential:2' stacks edits; take it in regime single"):
        evaluate(tiny_llama64, "sequential:2", ceiling_of="random")
    with pytest.raises(HparamError, match="none are generated; set generated_tokens=100"):
        evaluate(tiny_llama64, "batch:2", references={"Antarctica": ["ice"]})
