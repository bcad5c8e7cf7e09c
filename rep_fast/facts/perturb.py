"""Variants of a prompt under which an edit should still hold: renamed, shuffled and deeply embedded subjects.

All draws depend on the seed and the record alone, never on hash randomisation or the order of calls.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rep_fast.errors import HparamError, TextSourceError
from rep_fast.facts.case import EditCase
from rep_fast.facts.fact import SLOT, Sided
from rep_fast.facts.text_source import TextSource, rows_of

Encode = Callable[[str], Sequence[int]]
Decode = Callable[[Sequence[int]], str]
TokenStrings = Callable[[Sequence[int]], Sequence[str]]

MAX_SHUFFLES = 10
_ENUMERATED_TOKENS = 6  # 720 permutations; longer subjects are drawn from
_MAX_DRAWS = 2000  # gives up on long subjects with hardly any distinct arrangement ("la la la la la la la")


@dataclass(frozen=True, slots=True)
class SubjectPrompt:
    """A prompt with one `{}` and the subject that goes there, apart so that its tokens can be found."""

    prompt: str
    subject: str

    @property
    def text(self) -> str:
        """The full prompt, subject in place."""
        return self.prompt.replace(SLOT, self.subject)


@dataclass(frozen=True, slots=True)
class PerturbedCase:
    """A case with its perturbed prompts, each kind with an in-domain and an out-of-domain side."""

    case: EditCase
    rephrase: Sided[SubjectPrompt]
    shuffle: Sided[SubjectPrompt]
    long: Sided[SubjectPrompt]


def perturb(
    case: EditCase,
    *,
    encode: Encode,
    decode: Decode,
    text: TextSource | None,
    seed: int,
    n_words: int = 300,
    n_long_in: int = 5,
    n_long_out: int = 5,
    join: Literal["decode", "raw"] = "decode",
    token_strings: TokenStrings | None = None,
) -> PerturbedCase:
    """All perturbed prompts of a case (methods §8.1 to §8.3).

    Args:
        encode: text → token ids without special tokens.
        decode: token ids → text.
        text: where long contexts come from; None for no long contexts.
        seed: same seed, same case → same prompts, in any process.
        n_words: whitespace-separated words of a long context.
        n_long_in, n_long_out: number of long contexts on each side.
        join, token_strings: see `shuffled_subjects`.
    """
    fact = case.fact
    shuffles = shuffled_subjects(fact.subject, encode, decode, seed=seed, join=join, token_strings=token_strings)
    contexts: Sided[str] = Sided()
    if text is not None:
        contexts = long_contexts(text, n_words, n_long_in, n_long_out, f"{seed}:{case.case_id}")
    return PerturbedCase(
        case=case,
        rephrase=_mapped(case.subject_rephrases, lambda name: SubjectPrompt(fact.prompt, name.strip())),
        shuffle=_mapped(shuffles, lambda name: SubjectPrompt(fact.prompt, name)),
        long=_mapped(contexts, lambda context: SubjectPrompt(f"{context} {fact.prompt}", fact.subject)),
    )


def shuffled_subjects(
    subject: str,
    encode: Encode,
    decode: Decode,
    *,
    seed: int | str,
    join: Literal["decode", "raw"] = "decode",
    token_strings: TokenStrings | None = None,
) -> Sided[str]:
    """Up to min(10, n! − 1) other arrangements of the subject's n tokens, all different as text (methods §8.2).

    The first ⌈·/2⌉ are in-domain; a single-token subject has none, a subject of two tokens one in-domain.
    Arrangements that read like the subject, like each other, or that tear a character apart (U+FFFD) are passed over,
    so that repeated tokens leave fewer.

    Args:
        join: "decode" decodes the permuted ids; "raw" concatenates the tokenizer's token strings, as the reference
            implementation does (byte-level tokenizers then put their `Ġ` marks into the text).
        token_strings: token ids → token strings; needed for "raw".
    """
    if join not in ("decode", "raw"):
        raise HparamError(f"join={join!r} is unknown; use 'decode' or 'raw'")
    if join == "raw" and token_strings is None:
        raise HparamError("join='raw' needs token_strings, the tokenizer's ids → token strings")
    ids = list(encode(subject))
    wanted = min(MAX_SHUFFLES, math.factorial(len(ids)) - 1) if len(ids) < 20 else MAX_SHUFFLES
    found: list[str] = []

    def joined(permuted: Sequence[int]) -> str:
        return ("".join(token_strings(permuted)) if join == "raw" and token_strings else decode(permuted)).strip()

    seen = {subject, joined(ids)}
    for order in _permutations(len(ids), random.Random(f"{seed}:{subject}")):
        if len(found) == wanted:
            break
        name = joined([ids[place] for place in order])
        torn = "\ufffd" in name and "\ufffd" not in subject
        if name and not torn and name not in seen:
            seen.add(name)
            found.append(name)
    return Sided.halves(found)


def _permutations(n: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Permutations of n places in random order without repeats; for large n a bounded number of random draws."""
    identity = tuple(range(n))
    if n <= _ENUMERATED_TOKENS:
        orders = list(itertools.permutations(identity))[1:]
        rng.shuffle(orders)
        yield from orders
        return
    for _ in range(_MAX_DRAWS):
        order = list(identity)
        rng.shuffle(order)
        yield tuple(order)


def long_contexts(text: TextSource, n_words: int, n_in: int, n_out: int, seed: int | str) -> Sided[str]:
    """Passages of exactly `n_words` words to stand before a prompt (methods §8.3).

    Each starts at a random document and runs on through the following ones (round the end to the beginning); words
    are joined by single spaces, braces deleted. Starts differ while there are documents enough.

    Raises:
        HparamError: a count is out of range.
        TextSourceError: the whole source has fewer words.
    """
    if n_words < 1 or n_in < 0 or n_out < 0:
        raise HparamError(f"n_words={n_words}, n_in={n_in}, n_out={n_out}: needs n_words >= 1 and counts >= 0")
    rows, rng, count = rows_of(text), random.Random(f"long:{seed}"), n_in + n_out
    if count <= len(rows):
        starts = rng.sample(range(len(rows)), count)
    else:
        starts = [rng.randrange(len(rows)) for _ in range(count)]
    passages = [_passage(text, rows, start, n_words) for start in starts]
    return Sided(tuple(passages[:n_in]), tuple(passages[n_in:]))


def _passage(text: TextSource, rows: Sequence[str], start: int, n_words: int) -> str:
    words: list[str] = []
    for step in range(len(rows)):
        words += rows[(start + step) % len(rows)].replace("{", "").replace("}", "").split()
        if len(words) >= n_words:
            return " ".join(words[:n_words])
    raise TextSourceError(
        f"text source {text.name!r} has {len(words)} words, {n_words} were asked for; use a longer text"
    )


def _mapped(sided: Sided[str], make: Callable[[str], SubjectPrompt]) -> Sided[SubjectPrompt]:
    return Sided(tuple(map(make, sided.in_domain)), tuple(map(make, sided.out_of_domain)))
