"""Perturbations: counts, sides, distinctness, and the same draws in every process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rep_fast.errors import HparamError, TextSourceError
from rep_fast.facts import EditCase, Fact, MemoryText, Sided, long_contexts, perturb, shuffled_subjects

TEXT = MemoryText("words", [f"w{number} {{x}} y{number}" for number in range(40)])


def encode(text: str) -> list[int]:
    """Words as tokens."""
    return [int.from_bytes(word.encode(), "big") for word in text.split(" ")]


def decode(ids: Sequence[int]) -> str:
    return " ".join(number.to_bytes((number.bit_length() + 7) // 8, "big").decode() for number in ids)


@pytest.mark.parametrize(
    ("n", "inside", "outside"), [(1, 0, 0), (2, 1, 0), (3, 3, 2), (4, 5, 5), (7, 5, 5), (30, 5, 5)]
)
def test_number_of_shuffles(n: int, inside: int, outside: int) -> None:
    subject = " ".join(f"t{number}" for number in range(n))
    shuffled = shuffled_subjects(subject, encode, decode, seed=0)
    assert (len(shuffled.in_domain), len(shuffled.out_of_domain)) == (inside, outside)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=7), st.integers(0, 3))
def test_shuffles_are_distinct_other_arrangements_of_the_same_tokens(words: list[str], seed: int) -> None:
    subject = " ".join(words)
    found = list(shuffled_subjects(subject, encode, decode, seed=seed))
    assert len(set(found)) == len(found)
    assert subject not in found
    assert all(sorted(text.split()) == sorted(words) for text in found)
    repeats = math.prod(map(math.factorial, Counter(words).values()))
    arrangements = math.factorial(len(words)) // repeats
    assert len(found) == min(10, arrangements - 1)


def test_another_seed_draws_other_shuffles() -> None:
    subject = " ".join("abcdefgh")
    assert shuffled_subjects(subject, encode, decode, seed=0) != shuffled_subjects(subject, encode, decode, seed=1)


def test_equal_tokens_have_no_other_arrangement() -> None:
    assert len(shuffled_subjects(" ".join("a" * 12), encode, decode, seed=0)) == 0


def test_arrangements_that_tear_a_character_apart_are_passed_over() -> None:
    subject = "né"
    found = list(
        shuffled_subjects(
            subject, lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace"), seed=0
        )
    )
    assert found == ["én"]


def test_raw_join_concatenates_token_strings() -> None:
    def token_strings(ids: Sequence[int]) -> list[str]:
        return ["Ġ" + word for word in decode(ids).split()]

    found = shuffled_subjects("a b", encode, decode, seed=0, join="raw", token_strings=token_strings)
    assert found == Sided(("ĠbĠa",), ())


def test_raw_join_needs_token_strings() -> None:
    with pytest.raises(HparamError, match="needs token_strings"):
        shuffled_subjects("a b", encode, decode, seed=0, join="raw")


def test_unknown_join() -> None:
    with pytest.raises(HparamError, match="join='glue' is unknown"):
        shuffled_subjects("a b", encode, decode, seed=0, join="glue")  # type: ignore[arg-type]


def test_long_contexts_have_exactly_the_words_asked_for_and_no_braces() -> None:
    contexts = long_contexts(TEXT, 7, 5, 5, 0)
    assert (len(contexts.in_domain), len(contexts.out_of_domain)) == (5, 5)
    assert len(set(contexts)) == 10
    for context in contexts:
        assert len(context.split(" ")) == 7
        assert "{" not in context
        assert "}" not in context


def test_a_context_runs_on_through_the_following_documents() -> None:
    (context,) = long_contexts(MemoryText("m", ["a b", "c", "", "d e"]), 5, 1, 0, 3)
    assert context in {"a b c d e", "c d e a b", "d e a b c"}


def test_few_documents_give_repeated_starts_instead_of_an_error() -> None:
    assert len(long_contexts(MemoryText("m", ["a b c"]), 2, 2, 2, 0)) == 4


def test_a_source_with_too_few_words() -> None:
    with pytest.raises(TextSourceError, match="'m' has 3 words, 4 were asked for"):
        long_contexts(MemoryText("m", ["a b", "c"]), 4, 1, 0, 0)


@pytest.mark.parametrize(("n_words", "n_in", "n_out"), [(0, 1, 1), (5, -1, 1), (5, 1, -1)])
def test_counts_out_of_range(n_words: int, n_in: int, n_out: int) -> None:
    with pytest.raises(HparamError, match="counts >= 0"):
        long_contexts(TEXT, n_words, n_in, n_out, 0)


def case(case_id: int = 7) -> EditCase:
    fact = Fact("The tongue of {} is", "Ana Maria Lopez Garcia", "English")
    return EditCase(case_id, fact, subject_rephrases=Sided.halves(["A. Lopez", " Ana ", "Dr. Lopez"]))


def test_perturbed_prompts_stand_where_the_subject_stood() -> None:
    perturbed = perturb(case(), encode=encode, decode=decode, text=TEXT, seed=0, n_words=6)
    assert [item.text for item in perturbed.rephrase.in_domain] == ["The tongue of A. Lopez is", "The tongue of Ana is"]
    assert [item.text for item in perturbed.rephrase.out_of_domain] == ["The tongue of Dr. Lopez is"]
    assert {item.prompt for item in perturbed.shuffle} == {"The tongue of {} is"}
    assert len(perturbed.shuffle) == 10
    assert len(perturbed.long) == 10
    for item in perturbed.long:
        assert item.subject == "Ana Maria Lopez Garcia"
        assert item.prompt.endswith(" The tongue of {} is")
        assert len(item.prompt.split()) == 6 + 5


def test_no_text_gives_no_long_contexts() -> None:
    assert len(perturb(case(), encode=encode, decode=decode, text=None, seed=0).long) == 0


def test_cases_get_contexts_of_their_own_whatever_the_order() -> None:
    def run(case_id: int) -> object:
        return perturb(case(case_id), encode=encode, decode=decode, text=TEXT, seed=0, n_words=6).long

    first, second = run(1), run(2)
    assert first != second
    assert (run(2), run(1)) == (second, first)


DRAW = """
from tests.facts.test_perturb import TEXT, case, decode, encode
from rep_fast.facts import perturb
print(perturb(case(), encode=encode, decode=decode, text=TEXT, seed=3, n_words=6))
"""


def test_a_restarted_process_draws_the_same() -> None:
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", DRAW],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = perturb(case(), encode=encode, decode=decode, text=TEXT, seed=3, n_words=6)
    assert outputs == {f"{here}\n"}


def test_raw_join_never_gives_the_subject_back() -> None:
    subject = "a b a b a b b"  # 35 arrangements of more tokens than are enumerated

    def token_strings(ids: Sequence[int]) -> list[str]:
        return ["▁" + word for word in decode(ids).split()]

    itself = "".join(token_strings(encode(subject)))
    for seed in range(30):
        found = shuffled_subjects(subject, encode, decode, seed=seed, join="raw", token_strings=token_strings)
        assert len(found) == 10
        assert itself not in found
