"""Neighbour prompts that the record's own group edits: left out and counted, or asked."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from example_cases import PROTOCOL, TEXT, make_cases, random_edit, without_times
from rich.console import Console

from rep_fast.errors import RunMismatchError
from rep_fast.evaluation import METRICS, Protocol, Regime, evaluate_regime
from rep_fast.evaluation.questions import edited_neighbours
from rep_fast.evaluation.records import CaseRecord
from rep_fast.facts import EditCase, Fact

OTHER = "Zürich belongs to the continent of"
ASK = dataclasses.replace(PROTOCOL, edited_neighbours="ask")


def make_pair() -> list[EditCase]:
    """Two records; a neighbour of the first asks what the second edits."""
    first, second = make_cases(2)
    first = dataclasses.replace(first, neighborhood_prompts=(second.fact.text, OTHER))
    return [first, dataclasses.replace(second, paraphrase_prompts=("Its continent is",), neighborhood_prompts=(OTHER,))]


def make_question_pair() -> list[EditCase]:
    """zsRE's form: what the second record edits stands among the first one's neighbours, without the question mark."""
    asked = "nq question: who wrote Macbeth"
    first = EditCase(
        1, Fact("Who wrote {}?", "Hamlet", "Kyd"), neighborhood_prompts=(asked, "nq question: who sang it"),
        neighborhood_target="Todd",
    )  # fmt: skip
    return [first, EditCase(2, Fact("nq question: who wrote {}?", "Macbeth", "Kyd"))]


def evaluate(lm, cases, regime="batch:2", *, protocol=PROTOCOL, **options):
    def write(step, seed, active):
        return random_edit(lm, step[0], seed, size=2.0)

    return evaluate_regime(
        lm, cases, {"random": write}, regime=Regime.parse(regime), seeds=(0,), text=TEXT, protocol=protocol, **options
    )


def lines_of(directory):
    return {line["case_id"]: line for line in map(json.loads, (directory / "results.jsonl").read_text().splitlines())}


@pytest.mark.parametrize(
    ("regime", "protocol", "asked", "left_out"),
    [
        ("single", PROTOCOL, 3, 0),
        ("batch:1", PROTOCOL, 3, 0),
        ("batch:2", PROTOCOL, 2, 1),
        ("sequential", PROTOCOL, 2, 1),
        ("batch:2", ASK, 3, 0),
    ],
)
def test_what_the_group_edits_is_left_out_and_counted_or_asked(
    tiny_llama64, tmp_path, regime, protocol, asked, left_out
):
    found = evaluate(tiny_llama64, make_pair(), regime, protocol=protocol, out_dir=tmp_path / "run")
    assert found["random"]["locality"].n == asked
    assert found.neighbours_left_out == found.to_dict()["neighbours_left_out"] == {"random": left_out}
    lines = lines_of(tmp_path / "run")
    assert [lines[case_id]["neighbours_left_out"] for case_id in (10, 11)] == [left_out, 0]


def test_the_table_says_how_many_were_left_out(tiny_llama64):
    for protocol, is_shown in ((PROTOCOL, True), (ASK, False)):
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(evaluate(tiny_llama64, make_pair(), protocol=protocol).table())
        assert ("neighbours not asked, their group edits them" in console.export_text()) == is_shown


def test_a_question_is_left_out_with_its_mark_and_without(tiny_llama64):
    """The same neighbours stand behind agreement and behind zsRE's correctness."""
    dropped = evaluate(tiny_llama64, make_question_pair())["random"]
    assert (dropped["locality"].n, dropped["zsre_specificity"].n) == (1, 1)
    asked = evaluate(tiny_llama64, make_question_pair(), protocol=ASK)["random"]
    assert asked["locality"].n == 2
    first, second = make_question_pair()
    only_edited = dataclasses.replace(first, neighborhood_prompts=first.neighborhood_prompts[:1])
    alone = evaluate(tiny_llama64, [only_edited, second])["random"]
    assert not {"locality", "zsre_specificity"} & set(alone)
    # the record stays one of zsRE
    assert alone["zsre_efficacy"].n == dropped["zsre_efficacy"].n == asked["zsre_efficacy"].n == 1


def test_older_records_are_zsre_s_where_a_question_was_scored(tiny_llama64, tmp_path):
    evaluate(tiny_llama64, make_question_pair(), out_dir=tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert {case_id: line.pop("asks_questions") for case_id, line in lines.items()} == {1: True, 2: False}
    assert [CaseRecord.from_json(lines[case_id]).is_of_questions for case_id in (1, 2)] == [True, False]


@pytest.mark.parametrize(
    ("edited", "left_out"),
    [
        (("nq question: who sang it",), ("nq question: who sang it",)),
        (("nq question: who sang it?",), ("nq question: who sang it",)),
        (("who sang it",), ()),
        (("A town is in?",), ()),
    ],
)
def test_wordings_that_count_as_the_same_question(edited, left_out):
    prompts = ("nq question: who sang it", "A town is in")
    case = EditCase(0, Fact("{} is", "It", "so"), neighborhood_prompts=prompts, neighborhood_target="Todd")
    assert edited_neighbours(case, edited) == left_out
    assert edited_neighbours(dataclasses.replace(case, neighborhood_target=""), prompts) == ()


def test_a_run_from_before_the_choice_goes_on_as_it_began(tiny_llama64, tmp_path):
    whole = evaluate(tiny_llama64, make_pair(), out_dir=tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["protocol"].pop("edited_neighbours") == "drop"
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings))
    results = tmp_path / "run" / "results.jsonl"
    first = json.loads(results.read_text().splitlines()[0])
    assert first.pop("neighbours_left_out") == 1
    results.write_text(json.dumps(first) + "\n")
    resumed = evaluate(tiny_llama64, make_pair(), out_dir=tmp_path / "run", resume=True)
    unknown = {"neighbours_left_out": {"random": None}}
    assert without_times(resumed) | unknown == without_times(whole) | unknown
    assert resumed.neighbours_left_out == {"random": None}
    with pytest.raises(RunMismatchError, match=" has protocol="):
        evaluate(tiny_llama64, make_pair(), protocol=ASK, out_dir=tmp_path / "run", resume=True)


def test_every_metric_of_neighbours_says_so():
    meanings = {metric.name: metric.meaning for metric in METRICS}
    said = {
        name for name, meaning in meanings.items() if "neighbours that the same group edits are left out" in meaning
    }
    assert said == {"locality", "locality_macro", "path_locality", "ns", "nm_diff", "zsre_specificity"}
    assert Protocol().edited_neighbours == "drop"
