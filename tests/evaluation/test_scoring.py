from __future__ import annotations

import math

import pytest
import torch

from rep_fast.errors import TokenizationError
from rep_fast.evaluation import Question, plan_scoring, run_scoring, score_targets
from rep_fast.models import Site

PAIRS = [
    ("Slovenia belongs to the continent of", "Antarctica"),
    ("Slovenia belongs to the continent of", "Europe"),
    ("The mother tongue of Danielle Darrieux is", "Korean and French"),
    ("The mother tongue of Danielle Darrieux is", "Korean"),
    ("I think that you are right. Because of this, the Eiffel Tower is located in the city of", "Los Angeles"),
    ("Microsoft Windows is developed by", "Apple"),
    ("Slovenia belongs to the continent of", "Europe"),
]


def naive_score(lm, prompt, target):
    """One pair, one forward pass, no batching: (hits, arg-max, mean NLL)."""
    answer = lm.answer(prompt, target)
    with torch.no_grad():
        logits = lm.logits([list(answer.input_ids)])[0, list(answer.positions)].double()
    best = logits.argmax(-1).tolist()
    nll = [-float(row.log_softmax(-1)[token]) for row, token in zip(logits, answer.target_ids, strict=True)]
    hits = tuple(a == b for a, b in zip(best, answer.target_ids, strict=True))
    return hits, tuple(best), sum(nll) / len(nll)


@pytest.mark.parametrize("token_budget", [1, 40, 8192])
def test_batched_scores_equal_single_forwards(tiny_lm64, token_budget):
    scores = score_targets(tiny_lm64, PAIRS, token_budget=token_budget)
    assert len(scores) == len(PAIRS)
    for (prompt, target), score in zip(PAIRS, scores, strict=True):
        hits, best, nll = naive_score(tiny_lm64, prompt, target)
        assert score.hits == hits
        assert score.argmax == best
        assert score.nll == pytest.approx(nll, rel=1e-9)


def test_scores_see_the_right_token(tiny_llama64):
    """A target made of the model's own greedy tokens is an exact match; one other token breaks it."""
    lm = tiny_llama64
    prompt_ids = lm.answer(*PAIRS[0]).prompt_ids
    with torch.no_grad():
        greedy = int(lm.logits([list(prompt_ids)])[0, -1].argmax())
    word = lm.tokenizer.decode([greedy])
    assert lm.answer(PAIRS[0][0], word).target_ids != ()
    score = score_targets(lm, [(PAIRS[0][0], word)])[0]
    first = lm.answer(PAIRS[0][0], word).target_ids[0]
    assert score.hits[0] == (first == greedy)
    assert score.argmax[0] == greedy


def test_rows_are_shared_by_equal_inputs_and_prefixes(tiny_llama):
    lm = tiny_llama
    questions = [Question(prompt, target) for prompt, target in PAIRS]
    plan = plan_scoring(lm, questions)
    inputs = [tuple(lm.answer(prompt, target).input_ids) for prompt, target in PAIRS]
    kept = [a for a in set(inputs) if not any(a != b and b[: len(a)] == a for b in inputs)]
    assert sum(planned.batch.n_rows for planned in plan.batches) == len(kept) < len(set(inputs)) <= len(inputs)


def test_rows_with_different_subject_positions_stay_apart(tiny_llama):
    questions = [Question(*PAIRS[0], subject_position=p) for p in (None, 1, 2, 2)]
    plan = plan_scoring(tiny_llama, questions)
    assert sorted(str(p) for planned in plan.batches for p in planned.subject_positions) == ["1", "2", "None"]
    scores = run_scoring(tiny_llama, plan)
    assert len({score.argmax for score in scores}) == 1


def test_batches_keep_the_token_budget(tiny_llama):
    questions = [Question(prompt + " " + "so " * n, target) for n, (prompt, target) in enumerate(PAIRS * 4)]
    plan = plan_scoring(tiny_llama, questions, token_budget=120)
    assert len(plan.batches) > 2
    assert all(p.batch.input_ids.numel() <= 120 or p.batch.n_rows == 1 for p in plan.batches)


def test_head_runs_at_answer_positions_only(tiny_llama):
    seen = []
    handle = tiny_llama.head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:-1].numel()))
    try:
        plan = plan_scoring(tiny_llama, [Question(*pair) for pair in PAIRS])
        run_scoring(tiny_llama, plan)
    finally:
        handle.remove()
    assert sum(seen) == sum(len(positions) for planned in plan.batches for positions in planned.at)


def test_logits_that_are_not_finite_count_as_infinitely_unlikely(tiny_llama):
    with tiny_llama.patch(Site("hidden", 2), lambda hidden: hidden * math.nan):
        score = score_targets(tiny_llama, PAIRS[:1])[0]
    assert score.nll == math.inf


def test_text_longer_than_the_positions_is_refused(tiny_gpt2):
    with pytest.raises(TokenizationError, match="256 positions"):
        score_targets(tiny_gpt2, [("word " * 300, "Europe")])


def test_no_questions_give_no_scores(tiny_llama):
    assert score_targets(tiny_llama, []) == []


def test_rows_know_where_their_prompts_end(tiny_lm64):
    questions = [Question(prompt, target) for prompt, target in PAIRS]
    plan = plan_scoring(tiny_lm64, questions)
    told = {
        tuple(ids): length
        for planned in plan.batches
        for ids, length in zip(planned.batch.rows(), planned.batch.prompt_lengths.tolist(), strict=True)
    }
    for prompt, target in PAIRS:
        answer = tiny_lm64.answer(prompt, target)
        assert any(
            row[: len(answer.input_ids)] == answer.input_ids and length == len(answer.prompt_ids)
            for row, length in told.items()
        )


def test_a_prompt_that_begins_another_one_stands_apart(tiny_llama):
    """Where a prompt ends may decide what an edit does to it."""
    lm = tiny_llama
    long = lm.tokenizer.decode(lm.answer(*PAIRS[0]).input_ids[1:]) + " Europe and"
    plan = plan_scoring(lm, [Question(*PAIRS[0]), Question(*PAIRS[1]), Question(long, "Asia")])
    rows = [row for planned in plan.batches for row in planned.batch.rows()]
    starts = lm.answer(*PAIRS[0]).prompt_ids
    assert all(tuple(row[: len(starts)]) == starts for row in rows)
    lengths = sorted(length for planned in plan.batches for length in planned.batch.prompt_lengths.tolist())
    assert lengths[0] == len(starts) < lengths[-1]
