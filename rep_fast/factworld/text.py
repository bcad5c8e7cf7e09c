"""A world's text as a source for moments, scans, negatives and long contexts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from rep_fast.factworld.world import FactSource

SENTENCES_PER_DOCUMENT = 12


def document(world: FactSource, rng: random.Random) -> str:
    """Twelve sentences in a row."""
    return " ".join(world.sentence(rng).text for _ in range(SENTENCES_PER_DOCUMENT))


@dataclass(frozen=True)
class WorldText:
    """Documents drawn from a world: the same seed gives the same documents, another seed others.

    Args:
        world: where sentences come from.
        seed: of the draw.
        n_documents: after which the stream ends.
    """

    world: FactSource
    seed: int
    n_documents: int = 50_000

    @property
    def name(self) -> str:
        return f"{self.world.name}/text{self.seed}"

    @property
    def digest(self) -> str:
        """Identity of the content: world, seed, length and the first documents."""
        start = [text for _, text in zip(range(3), self, strict=False)]
        return hashlib.sha256(repr((self.name, self.n_documents, start)).encode("utf-8")).hexdigest()

    def __len__(self) -> int:
        return self.n_documents

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.n_documents:
            raise IndexError(index)
        return document(self.world, random.Random(f"{self.name}/{index}"))

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(self.n_documents))
