from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rep_fast.evaluation import METRICS, PROTOCOL_OF, CaseRecord, GeneratedText, PromptScore, measure


def prompt(*hits: int, nll: float = 1.0, agreement: float | None = None) -> PromptScore:
    return PromptScore(tuple(bool(hit) for hit in hits), nll, agreement)


def record(case_id: int, **groups) -> CaseRecord:
    return CaseRecord(0, case_id, "rome", groups)


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_exact_match_never_exceeds_token_match(hits):
    """T-metric-em-tm: EM <= TM, equal for one-token targets."""
    score = PromptScore(tuple(hits), 1.0)
    assert score.exact_match <= score.token_match
    if len(hits) == 1:
        assert score.exact_match == score.token_match
    assert score.exact_match == float(all(hits))


def test_micro_and_macro_averages_differ():
    records = [
        record(0, paraphrase={"new": (prompt(1), prompt(1), prompt(1), prompt(0))}),
        record(1, paraphrase={"new": (prompt(0),)}),
    ]
    measured = measure(records)
    assert measured["paraphrase"] == (pytest.approx(100 * 3 / 5), 5)
    assert measured["paraphrase_macro"] == (pytest.approx(100 * (0.75 + 0.0) / 2), 2)


def test_success_is_exact_and_token_match_partial():
    records = [record(0, success={"new": (prompt(1, 0),)}), record(1, success={"new": (prompt(1, 1),)})]
    measured = measure(records)
    assert measured["success"] == (50.0, 2)
    assert measured["rewrite_tm"] == (75.0, 2)


def test_reversion_counts_the_true_target():
    records = [record(0, success={"new": (prompt(0),), "true": (prompt(1),)})]
    assert measure(records)["reversion"] == (100.0, 1)


def test_locality_is_agreement_not_correctness():
    records = [record(0, locality={"kept": (prompt(0, 0, agreement=1.0), prompt(1, 1, agreement=0.5))})]
    assert measure(records)["locality"] == (75.0, 2)


@pytest.mark.parametrize("kind", ["rephrase", "shuffle", "long"])
@pytest.mark.parametrize("side", ["id", "ood"])
def test_perturbed_prompts_average_over_prompts(kind, side):
    name = f"{kind}_{side}"
    records = [record(0, **{name: {"new": (prompt(1), prompt(0))}}), record(1, **{name: {"new": (prompt(1),)}})]
    assert measure(records) == {name: (pytest.approx(200 / 3), 3)}


def test_rome_protocol_compares_probabilities():
    records = [
        record(
            0,
            success={"new": (prompt(1, nll=0.5),), "true": (prompt(0, nll=2.0),)},
            paraphrase={
                "new": (prompt(1, nll=0.5), prompt(0, nll=3.0)),
                "true": (prompt(0, nll=1.0), prompt(1, nll=1.0)),
            },
            locality={
                "kept": tuple(prompt(1, nll=n, agreement=1.0) for n in (1.0, 2.0, 1.0, 1.0)),
                "new": tuple(prompt(0, nll=n) for n in (2.0, 1.0, 2.0, 2.0)),
            },
        )
    ]
    measured = measure(records)
    assert measured["es"] == (100.0, 1)
    assert measured["ps"] == (50.0, 1)
    assert measured["ns"] == (75.0, 1)
    assert measured["s"][0] == pytest.approx(100 * 3 / (1 / 1.0 + 1 / 0.5 + 1 / 0.75))
    assert measured["em_diff"][0] == pytest.approx(100 * (math.exp(-0.5) - math.exp(-2.0)))
    assert measured["pm_diff"][0] == pytest.approx(
        100 * (math.exp(-0.5) - math.exp(-1) + math.exp(-3) - math.exp(-1)) / 2
    )
    assert measured["nm_diff"][0] == pytest.approx(100 * (math.exp(-1) - math.exp(-2)) * (3 - 1) / 4)


def test_equal_probabilities_are_no_win_for_either_side():
    records = [record(0, success={"new": (prompt(1),), "true": (prompt(1),)})]
    assert measure(records)["es"] == (0.0, 1)


def test_harmonic_mean_with_a_zero_is_zero():
    pair = {"new": (prompt(0, nll=2.0),), "true": (prompt(1, nll=1.0),)}
    neighbours = {"kept": (prompt(1, nll=1.0, agreement=1.0),), "new": (prompt(0, nll=2.0),)}
    assert measure([record(0, success=pair, paraphrase=pair, locality=neighbours)])["s"][0] == 0.0


def test_path_score_is_the_mean_of_what_there_is():
    base = {"success": {"new": (prompt(1),)}, "paraphrase": {"new": (prompt(0),)}}
    assert measure([record(0, **base)])["path_score"][0] == pytest.approx(50.0)
    with_locality = {**base, "locality": {"kept": (prompt(1, agreement=0.25),)}}
    assert measure([record(0, **with_locality)])["path_score"][0] == pytest.approx(100 * 1.25 / 3)


def test_pac_numbers_are_token_match_and_agreement():
    """By hand: two records of a two-token target, half and all of it right; agreement 1/4 and 1, not correctness."""
    records = [
        record(
            0,
            success={"new": (prompt(1, 0),)},
            paraphrase={"new": (prompt(0, 0), prompt(1, 0))},
            locality={"kept": (prompt(1, 1, agreement=0.25),)},
        ),
        record(1, success={"new": (prompt(1, 1),)}, locality={"kept": (prompt(0, 0, agreement=1.0),)}),
    ]
    measured = measure(records)
    assert measured["path_efficacy"] == (75.0, 2)
    assert measured["path_generality"] == (25.0, 1)
    assert measured["path_locality"] == (62.5, 2)
    assert measured["path_score"][0] == pytest.approx((75.0 + 25.0 + 62.5) / 3)
    assert measured["success"] == (50.0, 2)


def test_zsre_counts_correct_tokens_of_records_whose_neighbours_are_questions():
    """By hand: Eff = mean(2/3, 1), Gen of the one record that has paraphrases, Spe = correctness of "loc?" answers."""
    zsre = [
        record(
            0,
            success={"new": (prompt(1, 1, 0),)},
            paraphrase={"new": (prompt(1, 0, 0),)},
            locality={"kept": (prompt(0, 0, agreement=1.0),)},
            question={"true": (prompt(1, 0),)},
        ),
        record(
            1,
            success={"new": (prompt(1),)},
            locality={"kept": (prompt(1, agreement=1.0),)},
            question={"true": (prompt(0),)},
        ),
    ]
    counterfact = record(2, success={"new": (prompt(0),)}, locality={"kept": (prompt(0, agreement=1.0),)})
    measured = measure([*zsre, counterfact])
    assert measured["zsre_efficacy"] == (pytest.approx(100 * (2 / 3 + 1) / 2), 2)
    assert measured["zsre_generality"] == (pytest.approx(100 / 3), 1)
    assert measured["zsre_specificity"] == (25.0, 2)
    assert measured["locality"] == (100.0, 3)
    assert not {name for name in measure([counterfact]) if name.startswith("zsre")}


def test_measures_of_generated_texts_are_times_100_and_per_record():
    texts = (
        GeneratedText("prompt", "a", 5.0),
        GeneratedText("generation", "b", 4.0),
        GeneratedText("generation", "c", 6),
    )
    records = [
        CaseRecord(0, 0, "rome", generated=texts, consistency=0.25),
        CaseRecord(0, 1, "rome", generated=texts[:1]),
        CaseRecord(0, 2, "rome", generated=(GeneratedText("prompt", "d", 2.0),), consistency=0.75),
    ]
    assert measure(records) == {"fluency": (400.0, 3), "generation_fluency": (500.0, 1), "consistency": (50.0, 2)}


def test_infinite_nll_is_probability_zero():
    records = [record(0, success={"new": (prompt(0, nll=math.inf),), "true": (prompt(1, nll=0.0),)})]
    assert measure(records)["em_diff"][0] == pytest.approx(-100.0)


def test_nothing_measured_without_prompts():
    assert measure([record(0)]) == {}
    assert measure([]) == {}


def test_every_metric_has_a_protocol_and_a_meaning():
    assert len(PROTOCOL_OF) == len(METRICS)
    assert set(PROTOCOL_OF.values()) == {"REP", "EasyEdit", "PAC", "ROME", "zsRE"}
    assert all(metric.meaning for metric in METRICS)
