"""Forms of a subject: which texts training may see, in which order, and where their keys are read."""

from __future__ import annotations

import string
from functools import partial
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rep_fast.facts import EditCase, Fact, Sided, perturb
from rep_fast.models import EditableLM, Site
from rep_fast.rep import SubjectForms
from rep_fast.rep.forms import LocatedTexts, surface_forms

LAYER = 1
FACT = Fact("{} plays the sport of", "Kobe Bryant", "football", "basketball")
CASE = EditCase(5, FACT, subject_rephrases=Sided((" Kobe Bean Bryant ", "Bryant, Kobe"), ("Black Mamba",)))
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}")
WORDS = st.lists(st.text(string.ascii_letters, min_size=1, max_size=6), min_size=1, max_size=5)


def test_the_anchor_stands_first_and_forms_keep_their_order() -> None:
    forms = SubjectForms(FACT, rephrases=("Bryant, Kobe", "Kobe B. Bryant"), shuffles=("antKobe Bry",))
    texts = forms.texts(TEMPLATES)
    assert texts[0] == (FACT.prompt, FACT.subject)
    assert [form for _, form in texts[:: len(TEMPLATES)]] == [
        "Kobe Bryant", "Bryant, Kobe", "Kobe B. Bryant", "antKobe Bry",
    ]  # fmt: skip
    behind = [template.replace("{}", FACT.prompt) for template in TEMPLATES]
    for number in range(4):  # each form behind every template, in their order
        own = texts[number * len(TEMPLATES) : (number + 1) * len(TEMPLATES)]
        assert [prompt for prompt, _ in own] == behind
        assert len({form for _, form in own}) == 1
    assert all(prompt.count("{}") == 1 for prompt, _ in texts)
    assert not any(FACT.target_new in prompt + form for prompt, form in texts)


def test_bare_rows_are_the_other_forms_in_the_edits_own_prompt() -> None:
    forms = SubjectForms(FACT, rephrases=("Bryant, Kobe",), shuffles=("antKobe Bry", "Bryant Kobe"))
    texts = forms.texts(TEMPLATES)
    rows = forms.bare_rows(TEMPLATES)
    assert [texts[row] for row in rows] == [
        (FACT.prompt, form) for form in ("Bryant, Kobe", "antKobe Bry", "Bryant Kobe")
    ]
    assert 0 not in rows
    assert SubjectForms(FACT).bare_rows(TEMPLATES) == []


@pytest.mark.parametrize("join", ["decode", "raw"])
def test_a_record_shows_its_in_domain_side_as_evaluation_draws_it(
    tiny_llama: EditableLM, join: Literal["decode", "raw"]
) -> None:
    forms = SubjectForms.of_case(tiny_llama, CASE, seed=3, join=join)
    tokenizer = tiny_llama.tokenizer
    asked = perturb(
        CASE, encode=partial(tokenizer.encode, add_special_tokens=False), decode=tokenizer.decode, text=None, seed=3,
        join=join, token_strings=tokenizer.convert_ids_to_tokens,
    )  # fmt: skip
    evaluated = [prompt.subject for prompt in asked.shuffle.out_of_domain]
    assert forms.rephrases == ("Kobe Bean Bryant", "Bryant, Kobe")
    assert forms.shuffles == tuple(prompt.subject for prompt in asked.shuffle.in_domain)
    assert forms.shuffles
    assert evaluated
    assert not {*evaluated, *CASE.subject_rephrases.out_of_domain} & {form for _, form in forms.texts(TEMPLATES)}
    assert forms.origin == "given"


def test_the_seed_decides_the_shuffles(tiny_llama: EditableLM) -> None:
    one, same, other = (SubjectForms.of_case(tiny_llama, CASE, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.shuffles != other.shuffles
    assert one.rephrases == other.rephrases


def test_a_bare_fact_takes_the_names_given_or_simple_surface_forms(tiny_llama: EditableLM) -> None:
    given_names = SubjectForms.of_fact(tiny_llama, FACT, rephrases=["Bryant"], seed=0)
    assert (given_names.rephrases, given_names.origin) == (("Bryant",), "given")
    for nothing in (None, []):
        simple = SubjectForms.of_fact(tiny_llama, FACT, rephrases=nothing, seed=0)
        assert (simple.rephrases, simple.origin) == (surface_forms("Kobe Bryant"), "surface forms")
        assert simple.shuffles == given_names.shuffles


@pytest.mark.parametrize(
    ("subject", "forms"),
    [
        ("Slovenia", ("the Slovenia",)),
        ("Ada Byron", ("the Ada Byron", "Byron, Ada", "Byron")),
        ("Ada King Byron", ("the Ada King Byron", "Byron, Ada King", "Ada Byron", "Byron", "Ada K. Byron")),
        ("Ada", ("the Ada",)),
    ],
)
def test_surface_forms(subject: str, forms: tuple[str, ...]) -> None:
    assert surface_forms(subject) == forms


@given(words=WORDS)
def test_surface_forms_are_others_and_distinct(words: list[str]) -> None:
    subject = " ".join(words)
    forms = surface_forms(subject)
    assert forms
    assert subject not in forms
    assert len(set(forms)) == len(forms)
    assert all(words[-1] in form for form in forms)
    assert all(form.strip() == form for form in forms)


def whole_forward(lm: EditableLM, texts: list[tuple[str, str]]) -> tuple[list[Any], torch.Tensor]:
    found = [lm.locate(prompt, subject) for prompt, subject in texts]
    with lm.capture([Site("key", LAYER)]) as seen, torch.no_grad():
        lm.logits(lm.encode([one.ids for one in found]))
    return found, seen[Site("key", LAYER)]


def test_keys_are_read_at_the_subjects_last_token(build_lm: Any, tokenizer_kind: str) -> None:
    lm = build_lm("llama", tokenizer=tokenizer_kind)
    texts = SubjectForms(FACT, rephrases=("Bryant, Kobe", "Slovenia")).texts(TEMPLATES)
    found, keys = whole_forward(lm, texts)
    wanted = torch.stack([keys[row, one.position] for row, one in enumerate(found)])
    located = LocatedTexts.of(lm, texts)
    assert located.positions == tuple(one.position for one in found)
    read = located.subject_keys(lm, LAYER)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read, wanted, rtol=1e-4, atol=1e-5)


def test_keys_so_far_leave_bos_and_the_subjects_last_token_apart(build_lm: Any, tokenizer_kind: str) -> None:
    lm = build_lm("llama", tokenizer=tokenizer_kind)
    texts = [("I think that {}", "Kobe Bryant"), ("{} plays", "Slovenia"), ("{} plays", "Kobe Bryant")]
    found, keys = whole_forward(lm, texts)
    first = int(found[0].ids[0] == lm.tokenizer.bos_token_id)
    read = LocatedTexts.of(lm, texts).keys_so_far(lm, LAYER)
    for chosen in ([0, 1, 2], [2], [1, 0]):
        wanted = torch.cat([keys[row, first : found[row].position] for row in chosen])
        torch.testing.assert_close(read.before(chosen), wanted, rtol=1e-4, atol=1e-5)
    wanted = torch.stack([keys[row, one.position] for row, one in enumerate(found)])
    torch.testing.assert_close(read.subject, wanted, rtol=1e-4, atol=1e-5)


def test_no_key_before_the_first_token(tiny_llama: EditableLM) -> None:
    read = LocatedTexts.of(tiny_llama, [("{} plays", "Slovenia")]).keys_so_far(tiny_llama, LAYER)
    assert read.before([0]).shape == (0, tiny_llama.key_width(LAYER))
    assert read.subject.shape == (1, tiny_llama.key_width(LAYER))
