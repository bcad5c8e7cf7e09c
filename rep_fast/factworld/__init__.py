"""The embedded model and its world: a real transformer that knows facts, with no network and no GPU."""

from __future__ import annotations

from rep_fast.factworld.embedded import SPLITS, TEXT_SEED, background_facts, cases, load, save_trained, text, world_of
from rep_fast.factworld.record_world import RecordWorld
from rep_fast.factworld.records import evaluation_cases
from rep_fast.factworld.text import WorldText
from rep_fast.factworld.training import TrainingHparams, TrainingStep, recall, train
from rep_fast.factworld.world import FactSource, Person, Sentence, World

__all__ = [
    "SPLITS",
    "TEXT_SEED",
    "FactSource",
    "Person",
    "RecordWorld",
    "Sentence",
    "TrainingHparams",
    "TrainingStep",
    "World",
    "WorldText",
    "background_facts",
    "cases",
    "evaluation_cases",
    "load",
    "recall",
    "save_trained",
    "text",
    "train",
    "world_of",
]
