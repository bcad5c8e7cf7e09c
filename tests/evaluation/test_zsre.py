"""zsRE records: questions with neighbours of the form "nq question: …", often without paraphrases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from example_cases import PROTOCOL, random_edit

from rep_fast.evaluation import evaluate_single
from rep_fast.evaluation.questions import base_questions
from rep_fast.facts import EditCase, Fact, read_cases

SHIPPED = Path(__file__).parents[3] / "shared/data/robustkeyedit/test.zsre_para_prompt_para_subject_llama2-7b.json"


@pytest.mark.parametrize("neighbour", ["nq question: who sang it", "nq question: who sang it?"])
def test_neighbours_that_are_questions_are_asked_with_their_mark(neighbour):
    fact = Fact("Who wrote {}?", "Hamlet", "Kyd", "Shakespeare")
    case = EditCase(0, fact, neighborhood_prompts=(neighbour,), neighborhood_target="Todd Griffin")
    (asked,) = (item for item in base_questions(case) if item.group == "question")
    assert (asked.role, asked.question.prompt, asked.question.target) == (
        "true",
        "nq question: who sang it?",
        "Todd Griffin",
    )
    plain = EditCase(0, fact, neighborhood_prompts=("Macbeth was written by",), neighborhood_target="Shakespeare")
    assert not [item for item in base_questions(plain) if item.group == "question"]


@pytest.mark.skipif(not SHIPPED.is_file(), reason=f"{SHIPPED.name} is not there")
def test_the_robustness_file_of_zsre_is_measured(tiny_llama64):
    lm, cases = tiny_llama64, read_cases(SHIPPED).cases[:3]
    assert not any(case.paraphrase_prompts for case in cases)
    summary = evaluate_single(
        lm, cases, {"null": lambda case, seed: random_edit(lm, case, seed, size=0.0)}, seeds=(0,), protocol=PROTOCOL
    )
    cells = summary["null"]
    assert cells["success"].n == cells["locality"].n == cells["zsre_efficacy"].n == cells["zsre_specificity"].n == 3
    assert cells["rephrase_id"].n == cells["rephrase_ood"].n == 15
    assert not {"paraphrase", "zsre_generality", "ns", "s", "path_score"} & set(cells)
    assert cells["locality"].mean == 100.0
    right = []
    for case in cases:
        answer = lm.answer(case.neighborhood_prompts[0] + "?", case.neighborhood_target)
        with torch.no_grad():
            best = lm.logits([list(answer.input_ids)])[0, list(answer.positions)].argmax(-1)
        right.append(sum(a == b for a, b in zip(best.tolist(), answer.target_ids, strict=True)) / answer.n_targets)
    assert cells["zsre_specificity"].mean == pytest.approx(100 * sum(right) / 3)
