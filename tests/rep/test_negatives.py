"""Negatives: other subjects' keys, never the edited one's, the same for the same seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rep_fast.collisions import CorpusSample
from rep_fast.facts import Fact, MemoryText
from rep_fast.models import EditableLM
from rep_fast.rep import NegativePool, RepHparams, SubjectForms, draw_negatives
from rep_fast.rep.forms import LocatedTexts, TextKeys
from rep_fast.rep.negatives import Negatives

LAYER = 1
FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
# "Slovenia" is a form of the subject inside the second form, too
FORMS = SubjectForms(FACT, rephrases=("The Republic of Slovenia", "Slovenia in Europe"), shuffles=("veniaSlo",))
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}")
OTHERS = ("Michael Jordan", "Kobe Bryant", "Danielle Darrieux", "Microsoft Windows", "The Eiffel Tower")
HPARAMS = RepHparams(n_random=32, n_hard=16, n_subjects=3, n_other_tokens=40)
# a document that begins like the edited prompt has the anchor's own key in it
TEXT = MemoryText(
    "text",
    [
        "Slovenia belongs to the continent of Europe. The Republic of Slovenia is in Europe.",
        *[f"{name} plays basketball in the city of Paris. I think so." for name in OTHERS * 6],
    ],
)

Draw = Callable[..., Negatives]


@pytest.fixture(scope="module")
def corpus(tiny_llama: EditableLM) -> CorpusSample:
    return CorpusSample.collect(tiny_llama, TEXT, LAYER, tokens=400, block=64)


@pytest.fixture(scope="module")
def pool(corpus: CorpusSample) -> NegativePool:
    return NegativePool.of_facts([Fact("{} is located in", name, "Paris") for name in OTHERS], corpus)


@pytest.fixture(scope="module")
def positives(tiny_llama: EditableLM) -> LocatedTexts:
    return LocatedTexts.of(tiny_llama, FORMS.texts(TEMPLATES))


@pytest.fixture(scope="module")
def all_keys(tiny_llama: EditableLM, positives: LocatedTexts) -> TextKeys:
    return positives.keys_so_far(tiny_llama, LAYER)


@pytest.fixture(scope="module")
def positive_keys(all_keys: TextKeys) -> torch.Tensor:
    return all_keys.subject


@pytest.fixture(scope="module")
def response(positive_keys: torch.Tensor) -> torch.Tensor:
    """ρ of plain dot products: 1 at the anchor."""
    return positive_keys[0] / positive_keys[0].square().sum()


@pytest.fixture(scope="module")
def draw(
    tiny_llama: EditableLM,
    pool: NegativePool,
    positives: LocatedTexts,
    all_keys: TextKeys,
    response: torch.Tensor,
) -> Draw:
    """Negatives of FORMS with some settings changed."""

    def drawn(
        *, seed: int = 0, forms: SubjectForms = FORMS, pool: NegativePool = pool, hparams: RepHparams = HPARAMS
    ) -> Negatives:
        return draw_negatives(
            tiny_llama, forms, positives, pool, positive_keys=all_keys, response=response, templates=TEMPLATES,
            hparams=hparams, seed=seed,
        )  # fmt: skip

    return drawn


def is_among(keys: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Whether each key is one of the others, to the rounding between batches."""
    distance = torch.cdist(keys.double(), others.double()).amin(dim=1)
    return distance < 1e-3 * keys.norm(dim=1)


def other_texts(prompts: tuple[str, ...], subjects: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(prompt, subject) for subject in subjects for prompt in prompts]


# prompts an other subject may be put into: the edit's own, bare and behind a prefix, and the pool's
PROMPTS = (*(template.replace("{}", FACT.prompt) for template in TEMPLATES), "{} is located in")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
def test_no_negative_is_a_positive(draw: Draw, positive_keys: torch.Tensor, seed: int) -> None:
    drawn = draw(seed=seed, hparams=dataclasses.replace(HPARAMS, n_random=400, n_hard=400))
    for kind in (drawn.random, drawn.hard, drawn.subjects, drawn.other_tokens):
        assert len(kind)
        assert not is_among(kind, positive_keys).any()


def test_the_corpus_holds_positives_that_have_to_be_left_out(corpus: CorpusSample, positive_keys: torch.Tensor) -> None:
    """Else the property above would say nothing."""
    assert is_among(corpus.keys, positive_keys).any()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
def test_subjects_are_the_pools_and_never_the_edits_own(
    tiny_llama: EditableLM, draw: Draw, pool: NegativePool, seed: int
) -> None:
    known = dataclasses.replace(pool, subjects=(*OTHERS, FACT.subject, *FORMS.rephrases, *FORMS.shuffles))
    drawn = draw(seed=seed, pool=known, hparams=dataclasses.replace(HPARAMS, n_subjects=100))
    assert len(drawn.subjects) == 3 * len(OTHERS)
    allowed = LocatedTexts.of(tiny_llama, other_texts(PROMPTS, OTHERS)).subject_keys(tiny_llama, LAYER)
    assert is_among(drawn.subjects, allowed).all()


def test_each_drawn_subject_stands_in_the_edits_own_bare_prompt(tiny_llama: EditableLM, draw: Draw) -> None:
    bare = LocatedTexts.of(tiny_llama, other_texts((FACT.prompt,), OTHERS)).subject_keys(tiny_llama, LAYER)
    assert is_among(draw().subjects[::3], bare).all()
    assert len(draw().subjects) == 3 * HPARAMS.n_subjects


def test_without_other_prompts_or_subjects_there_are_fewer(draw: Draw, corpus: CorpusSample) -> None:
    assert len(draw(pool=NegativePool(OTHERS, (), corpus)).subjects) == 2 * HPARAMS.n_subjects
    alone = draw(pool=NegativePool((FACT.subject,), (), corpus))
    assert alone.subjects.shape == (0, corpus.keys.shape[1])
    assert len(alone.all()) == len(alone.random) + len(alone.hard) + len(alone.other_tokens)


def test_hard_ones_resemble_the_edit_but_not_too_much(draw: Draw, response: torch.Tensor, corpus: CorpusSample) -> None:
    rhos = draw().hard @ response
    assert len(rhos) == HPARAMS.n_hard
    assert float(rhos.max()) < HPARAMS.max_rho
    assert (rhos.diff() <= 1e-6).all()
    assert float(rhos[0]) > float((corpus.keys @ response).median())
    assert float((draw(hparams=dataclasses.replace(HPARAMS, max_rho=0.3)).hard @ response).max()) < 0.3


def test_other_tokens_come_from_before_the_subjects_last_one(
    tiny_llama: EditableLM, draw: Draw, positives: LocatedTexts, all_keys: TextKeys, response: torch.Tensor
) -> None:
    drawn = draw().other_tokens
    assert 0 < len(drawn) <= HPARAMS.n_other_tokens
    assert is_among(drawn, all_keys.before(range(len(positives.rows)))).all()
    assert float((drawn @ response).max()) < HPARAMS.max_rho


def test_random_ones_are_distinct_corpus_keys(draw: Draw, corpus: CorpusSample) -> None:
    drawn = draw().random
    assert 0 < len(drawn) <= HPARAMS.n_random
    same = (drawn[:, None] == corpus.keys).all(dim=2)  # [n_random, N]
    assert same.any(dim=1).all()
    assert len(set(same.int().argmax(dim=1).tolist())) > 0.8 * len(drawn)  # the text repeats itself


def test_the_seed_decides(draw: Draw) -> None:
    one, same, other = draw(seed=1), draw(seed=1), draw(seed=2)
    assert torch.equal(one.all(), same.all())
    for kind in ("random", "subjects", "other_tokens"):
        assert not torch.equal(getattr(one, kind), getattr(other, kind))
    assert torch.equal(one.hard, other.hard)  # the most similar ones are the same for every seed


def test_edits_of_one_seed_draw_on_their_own(draw: Draw) -> None:
    elsewhere = dataclasses.replace(FORMS, fact=dataclasses.replace(FACT, prompt="{} lies in"))
    assert not torch.equal(draw().random, draw(forms=elsewhere).random)


def test_all_is_every_kind_in_float32(draw: Draw) -> None:
    drawn = draw()
    assert torch.equal(drawn.all(), torch.cat([drawn.random, drawn.hard, drawn.subjects, drawn.other_tokens]))
    assert drawn.all().dtype == torch.float32


def test_a_pool_of_facts_names_each_subject_and_prompt_once(corpus: CorpusSample) -> None:
    facts = [Fact(prompt, name, "Paris") for name in OTHERS for prompt in ("{} is in", "{} likes")]
    pool = NegativePool.of_facts(iter(facts), corpus)
    assert pool.subjects == OTHERS
    assert pool.prompts == ("{} is in", "{} likes")
    assert (pool.corpus, pool.held_out) == (corpus, None)


def test_a_pool_of_text_finds_names_of_several_words(corpus: CorpusSample) -> None:
    text = MemoryText(
        "news", ["Yesterday, Ada King Byron met Charles Babbage in London.", "Ada King Byron left. None."]
    )
    pool = NegativePool.of_text(text, corpus)
    assert pool.subjects == ("Ada King Byron", "Charles Babbage")
    assert pool.prompts == ()
    assert NegativePool.of_text(text, corpus, limit=1).subjects == ("Ada King Byron",)
