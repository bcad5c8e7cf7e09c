"""Fluency and consistency of texts that an edited model writes (ROME's measures, methods §9).

Fluency is a weighted entropy of word n-grams: repetition, the sign of a damaged model, lowers it. Consistency is the
cosine of tf-idf vectors between what the model writes about a subject and reference texts about its new target.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rep_fast.errors import HparamError, MissingDependencyError, MissingFileError, PromptError, RecordError
from rep_fast.facts import EditCase
from rep_fast.models import EditableLM

# as in the published runs: length of a text with its prompt, and of the sampler
N_TOKENS, TOP_K = 100, 5
# how texts become words; runs with generated texts write it down
WORDS = "per sentence"
_WORD = re.compile(r"\b\w\w+\b")


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """H_n = −Σ f log₂ f over the frequencies f of the words' n-grams, in bits; 0 for fewer than n words."""
    counts = Counter(zip(*(words[begin:] for begin in range(n)), strict=False))
    total = counts.total()
    return -sum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def fluency(words: Sequence[str]) -> float:
    """H₂/3 + 2·H₃/3 in bits: the mean of ⅔·H₂ and 4⁄3·H₃ (published × 100)."""
    return ngram_entropy(words, 2) / 3 + 2 * ngram_entropy(words, 3) / 3


def word_tokenizer() -> Callable[[str], list[str]]:
    """The two steps of `nltk.word_tokenize`, sentences and then their words, without NLTK's downloaded data.

    The sentence splitter is untrained: it knows no abbreviations, so that a full stop after "Mr" is a word of its own.

    Raises:
        MissingDependencyError: nltk is not installed.
    """
    try:
        from nltk.tokenize import NLTKWordTokenizer, PunktSentenceTokenizer
    except ImportError as error:
        raise MissingDependencyError('fluency needs nltk; install it with pip install "rep-fast[metrics]"') from error
    sentences, words = PunktSentenceTokenizer(), NLTKWordTokenizer()
    return lambda text: [word for sentence in sentences.tokenize(text) for word in words.tokenize(sentence)]


@dataclass(frozen=True)
class GenerationPrompt:
    """Ids of a prompt to be continued; `kind` as in `GeneratedText`, `seed` of its sampler."""

    kind: str
    ids: tuple[int, ...]
    seed: int


def generation_prompts(lm: EditableLM, case: EditCase, *, seed: int, n_tokens: int) -> tuple[GenerationPrompt, ...]:
    """The edited prompt and, where the record brings them (CounterFact), its generation prompts.

    Raises:
        PromptError: the record's `generation_prompts` are no texts.
        TokenizationError: `n_tokens`, or a prompt, is longer than the model's table of positions.
    """
    own = case.extra.get("generation_prompts", [])
    if not isinstance(own, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in own):
        raise PromptError(f"generation_prompts must be a list of texts, got {own!r:.60}")
    prompts = []
    for number, (kind, text) in enumerate([("prompt", case.fact.text), *(("generation", text) for text in own)]):
        ids = tuple(lm.encode([text]).rows()[0])
        lm.check_length(max(n_tokens, len(ids)))
        # a sampler of its own for each text: what is asked before it does not change it
        draw = random.Random(f"generation/{seed}/{case.case_id}/{number}").getrandbits(62)
        prompts.append(GenerationPrompt(kind, ids, draw))
    return tuple(prompts)


def write_text(lm: EditableLM, prompt: GenerationPrompt, *, n_tokens: int) -> str:
    """The prompt and its continuation by the model as it stands, `n_tokens` in all; it may end earlier by itself."""
    fresh = max(0, n_tokens - len(prompt.ids))
    return lm.decode(lm.generate_ids(prompt.ids, max_new_tokens=fresh, top_k=TOP_K, seed=prompt.seed))


class References:
    """Texts about new targets, and the weight of each word among all of them.

    Weights are 1 + ln((1 + n)/(1 + d)), d of n texts holding the word; words of two and more characters, lower case.
    A word that no reference holds has d = 0, so that it counts against a text.

    Args:
        texts: new target → texts about it.
    Raises:
        HparamError: there is none.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        self._words = {target.strip(): [_words(text) for text in own] for target, own in texts.items()}
        self._n_texts = sum(len(own) for own in self._words.values())
        if not self._n_texts:
            raise HparamError("there are no reference texts for consistency; give at least one, or none of the targets")
        self._holding = Counter(word for own in self._words.values() for words in own for word in set(words))

    def consistency(self, target: str, texts: Sequence[str]) -> float | None:
        """RS: cosine in [0, 1] between these texts and the target's references, each joined to one; None without."""
        references = self._words.get(target)
        if not references or not texts:
            return None
        return self._cosine(Counter(_words(" ".join(texts))), Counter(word for words in references for word in words))

    def _cosine(self, first: Mapping[str, int], second: Mapping[str, int]) -> float:
        a, b = ({word: n * self._weight(word) for word, n in counts.items()} for counts in (first, second))
        norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        return sum(value * b.get(word, 0.0) for word, value in a.items()) / norms if norms else 0.0

    def _weight(self, word: str) -> float:
        return 1 + math.log((1 + self._n_texts) / (1 + self._holding[word]))


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Reference texts from a JSON object: new target → list of texts.

    Raises:
        MissingFileError: there is no such file. RecordError: it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"there is no file of reference texts {path}; check the name")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path} is not JSON ({error}); write an object: new target → list of texts") from error
    if not isinstance(content, dict) or not content:
        raise RecordError(f"{path} must hold a JSON object: new target → list of texts")
    for target, texts in content.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RecordError(f"{path}: the references of {target!r} must be a list of texts, got {texts!r:.60}")
    return content


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
