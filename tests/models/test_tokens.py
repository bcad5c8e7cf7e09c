"""Positions and target ids for every tokenizer kind (T-tok-index, T-target-ids; methods §2.3, §2.4)."""

from __future__ import annotations

import logging

import pytest

from rep_fast.errors import HparamError, PromptError, TokenizationError
from rep_fast.models.tokens import (
    STRATEGIES,
    Answer,
    answer,
    counted_position,
    encode_text,
    locate,
    locate_all,
    spanned_position,
)

SUBJECTS = ("Slovenia", "The Republic of Slovenia", "Michael Jordan", "Kobe Bryant", "iPhone", "xq7")
PROMPTS = ("{} belongs to", "{}", "In the city of {}", "I think that {} is a continent", "We stay at {} home")


def span_text(tokenizer, ids, position):
    """What the tokens up to and including `position` decode to."""
    return tokenizer.decode(list(ids[: position + 1]), skip_special_tokens=True)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_offsets_and_counting_agree(tiny_tokenizer, prompt, subject):
    """T-tok-index: ASCII subjects followed by a space or the end."""
    before, _ = prompt.split("{}")
    found = locate(tiny_tokenizer, prompt, subject)
    assert found.ids == tuple(encode_text(tiny_tokenizer, prompt.format(subject)))
    assert found.position == counted_position(tiny_tokenizer, before, subject, first=False)
    assert span_text(tiny_tokenizer, found.ids, found.position).strip() == (before + subject).strip()
    first = locate(tiny_tokenizer, prompt, subject, strategy="subject_first").position
    # a leading blank may be a token of its own: counting then stands on it, the offsets on the subject's first letter
    assert first - counted_position(tiny_tokenizer, before, subject, first=True) in (0, 1)
    assert tiny_tokenizer.decode(list(found.ids[:first]), skip_special_tokens=True).strip() == before.strip()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_strategies_stand_in_order(tiny_tokenizer, prompt):
    subject = "The Republic of Slovenia"
    places = {name: locate(tiny_tokenizer, prompt, subject, strategy=name) for name in STRATEGIES}
    last = places["subject_last"].position
    assert places["subject_first"].position < last
    assert places["last"].position == len(places["last"].ids) - 1
    follows = not prompt.endswith("{}")
    assert places["subject_first_after_last"].position == last + follows
    assert (places["last"].position == last) == (not follows)


def test_bos_is_counted(trained_tokenizers):
    """methods §2.4 item 3."""
    for kind, tokenizer in trained_tokenizers.items():
        first = locate(tokenizer, "{} is in Europe", "Slovenia", strategy="subject_first").position
        assert first == (0 if kind == "byte_level" else 1), kind


def test_first_token_after_a_trailing_space(tiny_tokenizer):
    """methods §2.4 item 1: a trailing space in front of the subject is not a token of its own in context."""
    ids, position = vars(locate(tiny_tokenizer, "In Europe {} is", "Slovenia", strategy="subject_first")).values()
    assert span_text(tiny_tokenizer, ids, position - 1).strip() == "In Europe"
    assert "Slo" in span_text(tiny_tokenizer, ids, position) or span_text(tiny_tokenizer, ids, position).endswith("S")


def test_subject_in_context_differs_from_bare(trained_tokenizers):
    """methods §2.4 item 2: byte-level ids of a subject depend on what stands before it."""
    tokenizer = trained_tokenizers["byte_level"]
    inside = locate(tokenizer, "In {} is", "Slovenia")
    start = locate(tokenizer, "{} is", "Slovenia")
    assert inside.ids[inside.position] != start.ids[start.position]


@pytest.mark.parametrize("subject", ["São Paulo", "Zürich", "東京", "👩‍🚀", "Go Hyeon-jeong", "naïve é"])
def test_subjects_beyond_ascii_end_at_their_last_byte(trained_tokenizers, subject):
    """A character outside the vocabulary takes several byte tokens; the last of them is the place."""
    for kind in ("byte_level", "byte_level_bos"):
        tokenizer = trained_tokenizers[kind]
        found = locate(tokenizer, "In {} is", subject)
        assert span_text(tokenizer, found.ids, found.position) == "In " + subject


def test_punctuation_after_the_subject(tiny_tokenizer):
    found = locate(tiny_tokenizer, "They saw {}'s home, in Europe", "Slovenia")
    assert span_text(tiny_tokenizer, found.ids, found.position).startswith("They saw Slovenia")


def test_spans_without_the_character_give_none():
    assert spanned_position([(0, 0), (0, 0)], 0, first=True) is None
    assert spanned_position([(0, 0), (0, 3), (3, 5)], 3, first=False) == 2
    assert spanned_position([(0, 1), (0, 1), (0, 1)], 0, first=False) == 2


@pytest.mark.parametrize("prompt", ["no place", "{} and {}", ""])
def test_prompt_needs_one_place(tiny_tokenizer, prompt):
    with pytest.raises(PromptError, match="write it once"):
        locate(tiny_tokenizer, prompt, "Slovenia")


@pytest.mark.parametrize("subject", ["", "  "])
def test_blank_subject_is_refused(tiny_tokenizer, subject):
    with pytest.raises(PromptError, match="blank"):
        locate(tiny_tokenizer, "{} is", subject)


def test_unknown_names_are_refused(tiny_tokenizer):
    with pytest.raises(HparamError, match="subject_last"):
        locate(tiny_tokenizer, "{} is", "Slovenia", strategy="first")
    with pytest.raises(HparamError, match="in_context"):
        answer(tiny_tokenizer, "Slovenia is", "Asia", mode="context")


PROMPT = "The Republic of Slovenia belongs to"


@pytest.mark.parametrize("target", ["Asia", "Antarctica", "Los Angeles", "the continent of Asia", " Asia"])
def test_in_context_ids_are_the_natural_ones(tiny_tokenizer, target):
    """Input and targets together are enc(prompt + " " + target); the positions predict the targets."""
    found = answer(tiny_tokenizer, PROMPT, target)
    natural = encode_text(tiny_tokenizer, f"{PROMPT} {target.strip()}")
    assert list(found.prompt_ids + found.target_ids) == natural
    assert list(found.prompt_ids) == encode_text(tiny_tokenizer, PROMPT)
    assert list(found.input_ids) == natural[:-1]
    assert [natural[position + 1] for position in found.positions] == list(found.target_ids)
    assert found.positions[0] == len(found.prompt_ids) - 1
    assert found.n_targets == len(found.target_ids)


# T with one and two words: in context, standalone (methods §2.4 item 4)
@pytest.mark.parametrize(
    ("kind", "one", "two"),
    [("metaspace_always", (1, 2), (2, 3)), ("metaspace_first", (1, 1), (2, 2)), ("slow", (1, 1), (2, 2))],
)
def test_target_counts_per_kind(trained_tokenizers, kind, one, two):
    tokenizer = trained_tokenizers[kind]
    for target, expected in (("Asia", one), ("Los Angeles", two)):
        counts = tuple(answer(tokenizer, PROMPT, target, mode=mode).n_targets for mode in ("in_context", "standalone"))
        assert counts == expected


def test_standalone_equals_in_context_for_byte_level(trained_tokenizers):
    for kind in ("byte_level", "byte_level_bos"):
        for target in ("Asia", "Antarctica", "Los Angeles"):
            both = [
                answer(trained_tokenizers[kind], PROMPT, target, mode=mode) for mode in ("in_context", "standalone")
            ]
            assert both[0] == both[1], (kind, target)


def test_standalone_trains_a_blank_with_always_prepend(trained_tokenizers):
    """T is one too large: the second-to-last prompt token is trained to predict "▁", the rest stands right."""
    tokenizer = trained_tokenizers["metaspace_always"]
    for target in ("Asia", "Los Angeles"):
        natural = answer(tokenizer, PROMPT, target)
        found = answer(tokenizer, PROMPT, target, mode="standalone")
        assert tokenizer.convert_ids_to_tokens(found.target_ids[0]) == "▁"
        assert found.target_ids[1:] == natural.target_ids
        assert found.positions[1:] == natural.positions
        assert found.positions[0] == len(found.prompt_ids) - 2
        assert found.input_ids == natural.input_ids


def test_standalone_glues_words_with_prepend_first(trained_tokenizers):
    """decode(["▁Los"]) has no leading blank: prompt and first target word run together."""
    tokenizer = trained_tokenizers["metaspace_first"]
    found = answer(tokenizer, PROMPT, "Los Angeles", mode="standalone")
    assert found.target_ids == answer(tokenizer, PROMPT, "Los Angeles").target_ids
    assert tokenizer.decode(list(found.input_ids), skip_special_tokens=True) == f"{PROMPT}Los"
    assert found.positions == tuple(range(len(found.input_ids) - 2, len(found.input_ids)))


def test_the_log_says_when_the_modes_differ(trained_tokenizers, caplog):
    with caplog.at_level(logging.INFO, logger="rep_fast.models.tokens"):
        answer(trained_tokenizers["byte_level"], PROMPT, "Asia")
        assert not caplog.records
        answer(trained_tokenizers["metaspace_always"], PROMPT, "Asia")
    assert "standalone" in caplog.text
    assert "in_context" in caplog.text


def test_prompt_with_trailing_blank_gives_it_to_the_target(trained_tokenizers):
    tokenizer = trained_tokenizers["byte_level"]
    assert answer(tokenizer, PROMPT + " ", "Asia") == answer(tokenizer, PROMPT, "Asia")


class Merging:
    """A tokenizer whose only merge crosses the border of prompt and target; `b` has no tokens at all."""

    is_fast = False
    bos_token_id = unk_token_id = None

    def __call__(self, text):
        ids = {"p": [7, 1], "p t": [7, 9, 2], " t": [3, 2], "p b": [7, 1], " b": []}
        return {"input_ids": ids[text]}

    def decode(self, ids):
        return "t" if ids else ""


def test_target_that_merges_with_the_prompt_keeps_the_prompt():
    assert answer(Merging(), "p", "t") == Answer.joined([7, 1], [3, 2])


def test_target_without_tokens_is_refused():
    for mode in ("in_context", "standalone"):
        with pytest.raises(TokenizationError, match="no tokens"):
            answer(Merging(), "p", "b", mode=mode)


def test_target_of_unknown_tokens_is_refused(trained_tokenizers):
    with pytest.raises(TokenizationError, match="東"):
        answer(trained_tokenizers["metaspace_first"], PROMPT, "東")


def test_blank_texts_are_refused(tiny_tokenizer):
    with pytest.raises(PromptError, match="target"):
        answer(tiny_tokenizer, PROMPT, " ")
    with pytest.raises(PromptError, match="prompt"):
        answer(tiny_tokenizer, " ", "Asia")


def test_standalone_target_longer_than_the_text_is_refused():
    class Short(Merging):
        def __call__(self, text):
            return {"input_ids": {" t": [1, 2, 3]}.get(text, [7])}

    with pytest.raises(TokenizationError, match="more tokens"):
        answer(Short(), "p", "t", mode="standalone")


def test_many_subjects_at_once_are_found_where_each_alone_is(tiny_tokenizer):
    pairs = [
        ("{} belongs to Europe", "Slovenia"),
        ("The capital of {} is", "São Paulo"),
        ("Somebody said that {}", "Go Hyeon-jeong"),
    ]
    alone = [locate(tiny_tokenizer, prompt, subject) for prompt, subject in pairs]
    assert locate_all(tiny_tokenizer, pairs) == alone
    assert locate_all(tiny_tokenizer, []) == []
