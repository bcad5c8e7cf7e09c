"""A world made of given records: the model trained on it knows the true facts of a data file.

Sentences are the records' own texts: the prompt, its paraphrases that name the subject, the rephrased subjects in the
prompt, and the neighbours, each completed by its true answer. New targets never appear.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rep_fast.errors import RecordError
from rep_fast.facts import EditCase
from rep_fast.factworld.world import Sentence

# Shares of the sentences: the fact itself, then paraphrase, rephrased subject, neighbour
_KINDS, _WEIGHTS = ("fact", "paraphrase", "rephrase", "neighbour"), (0.5, 0.1, 0.15, 0.25)


@dataclass(frozen=True)
class RecordWorld:
    """Facts and wordings of evaluation records."""

    cases: tuple[EditCase, ...]

    @staticmethod
    def from_cases(cases: Sequence[EditCase]) -> RecordWorld:
        """Keep the records that state a true answer.

        Raises:
            RecordError: none does.
        """
        stated = tuple(case for case in cases if case.fact.target_true)
        if not stated:
            raise RecordError("no record has a true answer (target_true); there is nothing a model could learn")
        return RecordWorld(stated)

    @property
    def name(self) -> str:
        """A digest of the facts, part of every file's identity."""
        digest = hashlib.sha256(repr(list(self.facts())).encode("utf-8")).hexdigest()
        return f"records/{digest[:12]}"

    def facts(self) -> Iterator[tuple[str, str]]:
        for case in self.cases:
            yield case.fact.text, str(case.fact.target_true)

    def sentence(self, rng: random.Random) -> Sentence:
        """A random record in one of its wordings; a kind the record lacks falls back to the fact itself."""
        case, kind = rng.choice(self.cases), rng.choices(_KINDS, _WEIGHTS)[0]
        answer = str(case.fact.target_true)
        if kind == "neighbour" and case.neighborhood_prompts and case.neighborhood_target:
            return Sentence(rng.choice(case.neighborhood_prompts), case.neighborhood_target)
        if kind == "paraphrase":
            naming = [text for text in case.paraphrase_prompts if case.fact.subject in text]
            if naming:
                return Sentence(rng.choice(naming), answer)
        if kind == "rephrase" and len(case.subject_rephrases):
            return Sentence(case.fact.prompt.replace("{}", rng.choice(list(case.subject_rephrases))), answer)
        return Sentence(case.fact.text, answer)
