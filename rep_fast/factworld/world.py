"""A small world of people and facts, composed from shared pools and drawn from one seed.

`World.generate()` draws the people, their aliases and one object per relation; `sentence` writes it down as text.
Subjects come in three disjoint groups: `background` (the training side: negatives may be drawn from it), `validation`
and `test` (the subjects of the evaluation records).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rep_fast.factworld import names

N_BACKGROUND, N_VALIDATION, N_TEST = 150, 50, 200
# Share of sentences: aliases carry the world's second wordings, filler gives the corpus keys that belong to nobody.
ALIAS_SHARE, FILLER_SHARE = 0.2, 0.12
SURFACE_FORMS = 10


@dataclass(frozen=True)
class Person:
    """A subject: its names, the ten others that the text uses, and the object of each relation."""

    first: str
    last: str
    title: str
    epithet: str
    aliases: tuple[str, ...]
    objects: tuple[str, ...]
    group: str

    @property
    def name(self) -> str:
        """The canonical name."""
        return f"{self.first} {self.last}"

    def called(self, form: str) -> str:
        """The name in one of `names.ALIAS_FORMS`."""
        return form.format(F=self.first, L=self.last, T=self.title, E=self.epithet)


@dataclass(frozen=True)
class Sentence:
    """A prompt and the answer that completes it; filler has no answer."""

    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}." if self.answer else f"{self.prompt}."


class FactSource(Protocol):
    """What a model can be trained on: facts to know and an endless supply of sentences that state them."""

    @property
    def name(self) -> str: ...

    def facts(self) -> Iterator[tuple[str, str]]:
        """(prompt with its subject, answer) of every fact the model must know."""

    def sentence(self, rng: random.Random) -> Sentence: ...


@dataclass(frozen=True)
class World:
    """People and relations; everything is a function of `seed`."""

    people: tuple[Person, ...]
    relations: tuple[names.Relation, ...]
    seed: int
    part: str = ""

    @staticmethod
    def generate(seed: int = 0) -> World:
        """Draw the world. Objects are dealt out evenly inside each group, so that every object has neighbours."""
        rng = random.Random(f"factworld/{seed}")
        pairs = [(first, last) for first in _first_names() for last in _last_names()]
        groups = ["background"] * N_BACKGROUND + ["validation"] * N_VALIDATION + ["test"] * N_TEST
        pairs = rng.sample(pairs, len(groups))
        decks = [_dealt(relation.objects, len(groups), rng) for relation in names.RELATIONS]
        people = [
            _person(first, last, tuple(deck[i] for deck in decks), group, rng)
            for i, ((first, last), group) in enumerate(zip(pairs, groups, strict=True))
        ]
        return World(tuple(people), names.RELATIONS, seed)

    def background(self) -> World:
        """The same world with its background people alone: text in which no evaluation subject appears."""
        return replace(self, people=self.group("background"), part="background")

    def group(self, name: str) -> tuple[Person, ...]:
        """The people of one group: `background`, `validation` or `test`."""
        return tuple(person for person in self.people if person.group == name)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Every (canonical prompt with the subject filled in, object) of the world."""
        for person in self.people:
            for relation, obj in zip(self.relations, person.objects, strict=True):
                yield relation.templates[0].format(person.name), obj

    @property
    def name(self) -> str:
        """Name and seed, part of every file's identity."""
        return f"factworld/{self.seed}{self.part and '/' + self.part}"

    def sentence(self, rng: random.Random) -> Sentence:
        """One sentence of the world's text: a fact in one of its wordings, or filler."""
        if rng.random() < FILLER_SHARE:
            return filler_sentence(rng)
        person = rng.choice(self.people)
        index = rng.randrange(len(self.relations))
        subject = rng.choice(person.aliases) if rng.random() < ALIAS_SHARE else person.name
        return Sentence(rng.choice(self.relations[index].templates).format(subject), person.objects[index])


def _first_names() -> list[str]:
    return [front + back for front in names.FIRST_FRONTS for back in names.FIRST_BACKS]


def _last_names() -> list[str]:
    return [front + back for front in names.LAST_FRONTS for back in names.LAST_BACKS]


def filler_sentence(rng: random.Random) -> Sentence:
    """A sentence that states no fact of the world."""
    parts = (names.FILLER_SUBJECTS, names.FILLER_VERBS, names.FILLER_OBJECTS)
    return Sentence(" ".join(rng.choice(part) for part in parts) + rng.choice(names.FILLER_ENDINGS), "")


def _person(first: str, last: str, objects: tuple[str, ...], group: str, rng: random.Random) -> Person:
    title, epithet = rng.choice(names.TITLES), rng.choice(names.EPITHETS)
    nameless = Person(first, last, title, epithet, (), objects, group)
    aliases = tuple(nameless.called(form) for form in rng.sample(names.ALIAS_FORMS, SURFACE_FORMS))
    return replace(nameless, aliases=aliases)


def _dealt(objects: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` objects in random order, whole decks at a time: any run of 20 people holds every object once."""
    deck: list[str] = []
    while len(deck) < count:
        deck += rng.sample(objects, len(objects))
    return deck[:count]
