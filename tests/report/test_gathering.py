"""How a collision reads: whole words around the token, no special tokens."""

from __future__ import annotations

import pytest

from rep_fast.collisions import Collision
from rep_fast.models import EditableLM
from rep_fast.report.gathering import around_hit


def hit(prefix: str, token: str, following: str) -> Collision:
    return Collision("Ada Byron", 1.0, 0.5, 7, prefix + token, token, following)


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        # a piece of a word: its other pieces stand beside it
        (hit(" written in D", "ut", "ch and Eng"), ("written in D", "ut", "ch and")),
        # windows that begin and end inside a word
        (hit("mund plays for", " Ash", "stone in Lis"), ("plays for ", "Ash", "stone in")),
        # marks of documents
        (hit("<|begin|>The city of", " Riga", ".<|begin|>And so"), ("The city of ", "Riga", ". And")),
        # a mark or blanks for a token: not nothing
        (hit("The city of Riga.", "<|begin|>", "And so on"), ("city of Riga.", " ", "And so")),
        (hit("The city of", "  ", "Riga is"), ("city of", "  ", "Riga")),
        (hit("The city of", "", " Riga is"), ("city of", " ", " Riga")),
        # windows that begin and end inside a character
        (hit("\ufffd本の", "首都", "は東\ufffd"), ("本の", "首都", "は東")),
        # nothing to cut at
        (hit("", "Riga", ""), ("", "Riga", "")),
        (hit("Ash", "stone", "ley"), ("Ash", "stone", "ley")),
    ],
)
def test_words_around_a_hit(tiny_llama: EditableLM, found: Collision, shown: tuple[str, str, str]) -> None:
    assert around_hit(tiny_llama, found) == shown


def test_a_narrow_place_gets_fewer_words(tiny_llama: EditableLM) -> None:
    found = hit(" one two three four five", " six", " seven eight nine")
    assert around_hit(tiny_llama, found, width=11) == ("four five ", "six", "")
    assert around_hit(tiny_llama, found, width=20) == ("two three four five ", "six", " seven")


def test_every_tokenizer_gives_one_text(build_lm: object, tokenizer_kind: str) -> None:
    lm = build_lm("llama", tokenizer=tokenizer_kind)  # type: ignore[operator]
    ids = lm.encode(["Slovenia belongs to the continent of Europe"]).rows()[0]
    for place in range(2, len(ids) - 1):
        whole, prefix = lm.tokenizer.decode(ids), lm.tokenizer.decode(ids[: place + 1])
        token = prefix.removeprefix(lm.tokenizer.decode(ids[:place]))
        found = Collision("Ada", 1.0, 0.5, place, prefix, token, whole.removeprefix(prefix))
        before, shown, after = around_hit(lm, found)
        assert before + shown + after in whole
        assert shown == token.lstrip()
