"""The trainer on worlds small enough to be learned in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rep_fast import factworld
from rep_fast.errors import HparamError
from rep_fast.facts import EditCase, Fact
from rep_fast.factworld import RecordWorld, TrainingHparams, TrainingStep, recall, train
from rep_fast.models import EditableLM

SMALL = TrainingHparams(
    vocabulary=300, hidden_size=32, key_width=64, layers=2, heads=2, steps=200, batch=8, length=32, learning_rate=1e-2
)
WORLD = RecordWorld.from_cases(
    [EditCase(i, Fact("{} plays", f"Player {name}", "chess", sport)) for i, (name, sport) in enumerate(
        [("Ada", "golf"), ("Bo", "polo"), ("Cy", "judo"), ("Di", "rugby"), ("Ed", "rowing"), ("Flo", "tennis")]
    )]
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trained_model_knows_its_facts_and_survives_saving(family: str, tmp_path: Path) -> None:
    seen: list[TrainingStep] = []
    lm = train(WORLD, replace(SMALL, family=family), progress=seen.append)
    assert recall(lm, list(WORLD.facts())) == 1.0
    assert [step.step for step in seen] == list(range(1, 201))
    assert seen[-1].loss < seen[0].loss
    factworld.save_trained(lm, WORLD, tmp_path / "model")
    again = EditableLM.from_pretrained(tmp_path / "model")
    assert again.fingerprint == lm.fingerprint
    assert recall(again, list(WORLD.facts())) == 1.0
    assert factworld.world_of(again.name) == WORLD


def test_training_is_deterministic() -> None:
    short = replace(SMALL, steps=3)
    one, two = (train(WORLD, short, seed=5).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = train(WORLD, short, seed=6).model.state_dict()
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_recall_counts_wrong_answers() -> None:
    lm = train(WORLD, SMALL)
    facts = [(prompt, "chess") for prompt, _ in WORLD.facts()]
    assert recall(lm, facts) == 0.0


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(HparamError, match="family llama or gpt2, not 'bert'"):
        TrainingHparams(family="bert")
