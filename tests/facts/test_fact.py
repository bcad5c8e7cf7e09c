"""Fact, Sided and EditCase: what they hold and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rep_fast.errors import PromptError
from rep_fast.facts import EditCase, Fact, Sided


def test_text_puts_the_subject_into_the_slot() -> None:
    assert (
        Fact("{} belongs to the continent of", "Slovenia", "Antarctica").text == "Slovenia belongs to the continent of"
    )


def test_subject_with_braces_is_taken_literally() -> None:
    assert Fact("{} is", "a {} b", "c").text == "a {} b is"


def test_surrounding_whitespace_is_removed() -> None:
    fact = Fact(" {} is in ", " Slovenia\n", " Asia", "\tEurope ")
    assert fact == Fact("{} is in", "Slovenia", "Asia", "Europe")


def test_from_text_finds_the_subject() -> None:
    fact = Fact.from_text("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "English", "French")
    assert fact == Fact("The mother tongue of {} is", "Danielle Darrieux", "English", "French")


@given(
    st.text(alphabet="ab ", max_size=8),
    st.text(alphabet="xyz", min_size=1, max_size=4),
    st.text(alphabet="ab ", max_size=8),
)
def test_from_text_and_text_are_inverse(before: str, subject: str, after: str) -> None:
    text = f"{before}{subject}{after}".strip()
    assert Fact.from_text(text, subject, "t").text == text


@pytest.mark.parametrize("prompt", ["no slot", "{} and {}", "{}{}"])
def test_prompt_needs_exactly_one_slot(prompt: str) -> None:
    with pytest.raises(PromptError, match="write exactly one"):
        Fact(prompt, "s", "t")


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new", "target_true"])
@pytest.mark.parametrize("value", ["", " \n"])
def test_blank_fields_are_refused_by_name(field: str, value: str) -> None:
    fields = {"prompt": "{} is", "subject": "s", "target_new": "t", "target_true": "u"} | {field: value}
    with pytest.raises(PromptError, match=rf"{field}\)? is empty"):
        Fact(**fields)


@pytest.mark.parametrize("field", ["prompt", "subject", "target_new"])
def test_other_types_are_refused(field: str) -> None:
    fields = {"prompt": "{} is", "subject": "s", "target_new": "t"} | {field: 7}
    with pytest.raises(PromptError, match=rf"{field}\)? must be a string, got int 7"):
        Fact(**fields)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(PromptError, match="surrogate"):
        Fact("{} is", "s\ud800", "t")


def test_from_text_refuses_an_absent_subject() -> None:
    with pytest.raises(PromptError, match="occurs 0 times"):
        Fact.from_text("Paris is in", "London", "Asia")


@pytest.mark.parametrize(("text", "subject"), [("Rome, the Rome of", "Rome"), ("anana is", "ana")])
def test_from_text_refuses_several_occurrences_overlapping_ones_too(text: str, subject: str) -> None:
    with pytest.raises(PromptError, match="occurs 2 times"):
        Fact.from_text(text, subject, "t")


def test_from_text_refuses_a_slot() -> None:
    with pytest.raises(PromptError, match="already holds"):
        Fact.from_text("{} is Rome", "Rome", "t")


@pytest.mark.parametrize(("n", "inside"), [(0, 0), (1, 1), (2, 1), (3, 2), (10, 5)])
def test_halves_gives_the_first_half_rounded_up(n: int, inside: int) -> None:
    sided = Sided.halves(list(range(n)))
    assert (len(sided.in_domain), len(sided)) == (inside, n)
    assert list(sided) == list(range(n))


def test_case_refuses_a_single_text_where_several_belong() -> None:
    with pytest.raises(PromptError, match="paraphrase_prompts must be a sequence"):
        EditCase(1, Fact("{} is", "s", "t"), paraphrase_prompts="one text")


def test_case_refuses_a_blank_neighbour() -> None:
    with pytest.raises(PromptError, match="neighborhood_prompts is empty"):
        EditCase(1, Fact("{} is", "s", "t"), neighborhood_prompts=("a", " "))


def test_case_refuses_another_id() -> None:
    with pytest.raises(PromptError, match="case_id must be an integer, got '1'"):
        EditCase("1", Fact("{} is", "s", "t"))  # type: ignore[arg-type]


def test_facts_need_no_torch() -> None:
    code = "import sys, rep_fast.facts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
