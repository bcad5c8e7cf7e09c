from __future__ import annotations

import json

import pytest
import torch
from example_cases import LAYER, PROTOCOL, TEXT, make_cases, random_edit, without_times

from rep_fast.edits import Edit
from rep_fast.errors import HparamError, NothingToEditError, OutputError, RecordError, RunMismatchError
from rep_fast.evaluation import Protocol, case_questions, evaluate_single, oracle_patch, perturb_case
from rep_fast.evaluation.questions import base_questions
from rep_fast.facts import EditCase, Fact
from rep_fast.models import Site


def columns_of(lm, **more):
    return {
        "random": lambda case, seed: random_edit(lm, case, seed),
        "null": lambda case, seed: random_edit(lm, case, seed, size=0.0),
        **more,
    }


def evaluate(lm, cases=None, columns=None, **options):
    options = {"seeds": (0, 1), "text": TEXT, "protocol": PROTOCOL, **options}
    return evaluate_single(lm, cases or make_cases(), columns or columns_of(lm), **options)


def test_null_edit_keeps_every_neighbour_and_a_large_one_does_not(tiny_lm64):
    summary = evaluate(tiny_lm64)
    assert summary["null"]["locality"].mean == 100.0
    assert summary["random"]["locality"].mean < 100.0
    assert summary["null"]["locality"].protocol == "REP"


def test_counts_are_prompts_over_all_seeds(tiny_llama64):
    cells = evaluate(tiny_llama64)["random"]
    assert cells["success"].n == 3 * 2
    assert cells["locality"].n == cells["paraphrase"].n == 2 * 3 * 2
    assert (cells["rephrase_id"].n, cells["rephrase_ood"].n) == (1 * 3 * 2, 2 * 3 * 2)
    assert (cells["long_id"].n, cells["long_ood"].n) == (2 * 3 * 2, 1 * 3 * 2)
    assert cells["shuffle_id"].n >= cells["shuffle_ood"].n > 0
    assert cells["paraphrase_macro"].n == cells["es"].n == cells["ns"].n == 3 * 2


@pytest.mark.parametrize("mode", ["hook", "merge"])
def test_model_is_bit_identical_afterwards(build_lm, mode):
    lm = build_lm("gpt2")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    evaluate(lm, protocol=Protocol(n_words=8, long_in=1, long_out=1, mode=mode), ceiling_of="random", seeds=(0,))
    after = lm.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lm.active_edits == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_model_is_clean_after_a_column_fails(build_lm):
    lm = build_lm("llama")

    def broken(case, seed):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(lm, columns=columns_of(lm, broken=broken))
    assert lm.active_edits == []


def test_scores_equal_those_of_single_forwards(tiny_llama64, tmp_path):
    """The records of a run are what scoring each prompt alone on the edited model gives."""
    lm, case = tiny_llama64, make_cases(1)[0]
    evaluate(lm, [case], seeds=(0,), out_dir=tmp_path / "run")
    line = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[0])
    perturbed = perturb_case(lm, case, text=TEXT, seed=0, protocol=PROTOCOL)
    edit = random_edit(lm, case, 0)
    counters: dict[tuple[str, str], int] = {}
    for item in case_questions(case, perturbed):
        number = counters.get((item.group, item.role), 0)
        counters[item.group, item.role] = number + 1
        answer = lm.answer(item.question.prompt, item.question.target)
        with torch.no_grad():
            clean = lm.logits([list(answer.input_ids)])[0, list(answer.positions)]
            with edit.applied(lm):
                logits = lm.logits([list(answer.input_ids)])[0, list(answer.positions)]
        stored = line["scores"][item.group][item.role][number]
        picked = logits.log_softmax(-1)[range(len(answer.target_ids)), list(answer.target_ids)]
        assert stored["nll"] == pytest.approx(-float(picked.mean()), rel=1e-9)
        assert stored["hits"] == [
            int(a == b) for a, b in zip(logits.argmax(-1).tolist(), answer.target_ids, strict=True)
        ]
        if item.role == "kept":
            assert stored["agreement"] == float((logits.argmax(-1) == clean.argmax(-1)).double().mean())
    assert counters[("locality", "kept")] == counters[("locality", "new")] == 2


def test_ceiling_forces_v_star_at_the_subject(tiny_lm64, tmp_path):
    lm, case = tiny_lm64, make_cases(1)[0]
    summary = evaluate(lm, [case], seeds=(0,), ceiling_of="random", out_dir=tmp_path / "run")
    assert summary.columns == ["random", "null", "ceiling"]
    assert "locality" not in summary["ceiling"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    stored = next(line for line in lines if line["column"] == "ceiling")["scores"]["success"]["new"][0]
    found = lm.locate(case.fact.prompt, case.fact.subject)
    v_star = random_edit(lm, case, 0).tensors["v_star"]

    def force(value):
        forced = value.clone()
        forced[0, found.position] = v_star
        return forced

    answer = lm.answer(case.fact.text, case.fact.target_new)
    with torch.no_grad(), lm.patch(Site("value", LAYER), force):
        logits = lm.logits([list(answer.input_ids)])[0, list(answer.positions)]
    picked = logits.log_softmax(-1)[range(len(answer.target_ids)), list(answer.target_ids)]
    assert stored["nll"] == pytest.approx(-float(picked.mean()), rel=1e-9)


def test_oracle_patch_leaves_other_rows_and_tokens_alone(tiny_llama64):
    lm, case = tiny_llama64, make_cases(1)[0]
    edit = random_edit(lm, case, 0)
    batch = lm.encode([case.fact.text, "Paris belongs to the continent of"])
    clean = lm.read(batch, [("value", LAYER)])[Site("value", LAYER)]
    with oracle_patch(lm, edit, [2, None]), lm.capture([("value", LAYER)]) as seen:
        lm.logits(batch)
    forced = seen["value", LAYER]
    assert torch.equal(forced[0, 2], edit.tensors["v_star"])
    forced = forced.clone()
    forced[0, 2] = clean[0, 2]
    assert torch.equal(forced, clean)


def test_ceiling_needs_one_written_value(tiny_llama64):
    lm = tiny_llama64

    def without_value(case, seed):
        made = random_edit(lm, case, seed)
        return Edit(made.facts, "memit", {}, made.fingerprint, made.modules)

    with pytest.raises(HparamError, match="carries no single MLP output"):
        evaluate(lm, columns={"memit": without_value}, ceiling_of="memit")


def test_same_seed_same_numbers(tiny_llama64):
    first, second = evaluate(tiny_llama64), evaluate(tiny_llama64)
    assert without_times(first) == without_times(second)


def test_seeds_change_the_perturbed_prompts(tiny_llama64):
    case = make_cases()[1]
    drawn = [perturb_case(tiny_llama64, case, text=TEXT, seed=seed, protocol=PROTOCOL) for seed in (0, 1)]
    assert drawn[0].shuffle != drawn[1].shuffle
    assert drawn[0].long != drawn[1].long
    assert drawn[0].rephrase == drawn[1].rephrase


@pytest.mark.parametrize("stop_after", [1, 4, 7])
def test_interrupted_run_resumes_to_the_same_result(tiny_llama64, tmp_path, stop_after):
    lm = tiny_llama64
    whole = evaluate(lm, ceiling_of="random", out_dir=tmp_path / "whole")

    def stop(done, total):
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, ceiling_of="random", out_dir=tmp_path / "run", progress=stop)
    with (tmp_path / "run" / "results.jsonl").open("ab") as results:
        results.write(b'{"seed":0,"case_')
    called = []

    def counted(case, seed):
        called.append((seed, case.case_id))
        return random_edit(lm, case, seed, size=0.0)

    resumed = evaluate(
        lm, columns=columns_of(lm, null=counted), ceiling_of="random", out_dir=tmp_path / "run", resume=True
    )
    assert without_times(resumed) == without_times(whole)
    lines = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    keys = [(line["seed"], line["case_id"], line["column"]) for line in lines]
    assert len(keys) == len(set(keys)) == 2 * 3 * 3
    finished_before = sum(1 for number in range(stop_after) if number % 3 == 1)
    assert len(called) == 6 - finished_before


def test_finished_run_resumes_without_editing(tiny_llama64, tmp_path):
    first = evaluate(tiny_llama64, out_dir=tmp_path / "run")

    def never(case, seed):
        raise AssertionError("nothing is left to do")

    again = evaluate(tiny_llama64, columns={"random": never, "null": never}, out_dir=tmp_path / "run", resume=True)
    assert again.to_dict() == first.to_dict()


def test_run_directory_guards_settings(tiny_llama64, tmp_path):
    evaluate(tiny_llama64, out_dir=tmp_path / "run", settings={"v_steps": 20})
    with pytest.raises(OutputError, match="not empty"):
        evaluate(tiny_llama64, out_dir=tmp_path / "run", settings={"v_steps": 20})
    with pytest.raises(RunMismatchError, match=" hparams="):
        evaluate(tiny_llama64, out_dir=tmp_path / "run", settings={"v_steps": 25}, resume=True)
    with pytest.raises(RunMismatchError, match=" seeds="):
        evaluate(tiny_llama64, out_dir=tmp_path / "run", settings={"v_steps": 20}, seeds=(0,), resume=True)
    changed = make_cases()
    changed[2] = EditCase(12, Fact("{} is in", "Kobe", "Asia"))
    with pytest.raises(RunMismatchError, match=" cases_digest="):
        evaluate(tiny_llama64, changed, out_dir=tmp_path / "run", settings={"v_steps": 20}, resume=True)


def test_a_case_that_cannot_be_edited_is_reported_not_lost(tiny_llama64, tmp_path):
    def refuses(case, seed):
        if case.case_id == 11:
            raise NothingToEditError("the target already is the answer")
        return random_edit(tiny_llama64, case, seed)

    summary = evaluate(tiny_llama64, columns={"rome": refuses}, out_dir=tmp_path / "run")
    assert summary["rome"]["success"].n == 2 * 2
    assert summary.failures["rome"] == tuple(f"case 11, seed {s}: the target already is the answer" for s in (0, 1))
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 6


def test_progress_counts_to_the_total(tiny_llama64):
    seen = []
    evaluate(tiny_llama64, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 12) for n in range(1, 13)]


def test_times_are_recorded_per_stage(tiny_llama64):
    seconds = evaluate(tiny_llama64).seconds["random"]
    assert set(seconds) == {"edit", "evaluation", "undo"}
    assert all(0 <= spread.median <= spread.p90 for spread in seconds.values())


def test_case_without_neighbours_paraphrases_or_truth(tiny_llama64):
    case = EditCase(0, Fact("{} is in", "Danielle Darrieux", "Asia"))
    summary = evaluate(tiny_llama64, [case], text=None)
    assert {"success", "shuffle_id"} <= set(summary["random"])
    assert not {"locality", "reversion", "paraphrase", "es", "long_id"} & set(summary["random"])


def test_neighbours_with_another_object_get_no_probability_comparison():
    case = EditCase(0, Fact("{} is in", "X", "Asia", "Europe"), neighborhood_prompts=("nq question: who",))
    assert [item.role for item in base_questions(case)] == ["new", "true"]
    answered = EditCase(
        0, Fact("{} is in", "X", "Asia", "Europe"), neighborhood_prompts=("nq question: who",), neighborhood_target="I"
    )
    assert [item.role for item in base_questions(answered) if item.group == "locality"] == ["kept"]


def test_arguments_are_checked(tiny_llama64, build_lm):
    lm, cases = tiny_llama64, make_cases()
    make = columns_of(lm)
    for options, error, match in (
        ({"cases": [], "columns": make}, RecordError, "no cases"),
        ({"cases": [cases[0], cases[0]], "columns": make}, RecordError, "repeats case_id 10"),
        ({"cases": cases, "columns": {}}, HparamError, "0 columns"),
        ({"cases": cases, "columns": make, "seeds": ()}, HparamError, "0 seeds"),
        ({"cases": cases, "columns": make, "seeds": (1, 1)}, HparamError, "repeat"),
        ({"cases": cases, "columns": {"ceiling": make["null"]}}, HparamError, "reserved"),
        ({"cases": cases, "columns": make, "ceiling_of": "rome"}, HparamError, "ceiling_of='rome'"),
    ):
        with pytest.raises(error, match=match):
            evaluate_single(lm, **options)
    fresh = build_lm("llama", dtype=torch.float64)
    with random_edit(fresh, cases[0], 0).applied(fresh), pytest.raises(HparamError, match="1 edits are active"):
        evaluate(fresh)
