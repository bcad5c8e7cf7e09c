"""Similarities on a tiny model: ρ = 1 at the edit's own key, and only the adapter changes what comes after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rep_fast import api
from rep_fast.analysis import form_similarities
from rep_fast.edits import KeyAdapter
from rep_fast.facts import EditCase, Fact, MemoryText, Sided
from rep_fast.models import EditableLM

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
CASE = EditCase(3, FACT, subject_rephrases=Sided(("The Republic of Slovenia",), ("Slovenija",)))
TEXT = MemoryText(
    "sports",
    [
        f"Player {i} called Kobe Bryant{i} plays basketball in Los Angeles and Paris {i * 7}. So it is."
        for i in range(60)
    ],
)
SMALL = {
    "v_steps": 3,
    "early_stop": None,
    "steps": 60,
    "rank": 2,
    "n_subjects": 3,
    "n_hard": 8,
    "n_random": 8,
    "layer": 1,
}


@pytest.fixture
def bench(tiny_llama: EditableLM, tmp_path: Path) -> api.Workbench:
    return api.Workbench(tiny_llama, text=TEXT, overrides=SMALL, cache_dir=tmp_path)


def test_similarities_are_those_of_the_transfer_law(bench: api.Workbench) -> None:
    plain = bench.edit(CASE)
    found = form_similarities(bench, plain, CASE)
    assert set(found) == {"original", "rephrase", "long", "other"}  # a subject of one token has no shuffles
    # float32 keys of the same text in batches of other widths
    assert float(found["original"][0][0]) == pytest.approx(1, rel=1e-3)
    assert len(found["rephrase"][0]) == 2
    assert all(torch.equal(before, after) for before, after in found.values())


def test_an_open_adapter_shows_in_what_comes_after(bench: api.Workbench) -> None:
    plain = bench.edit(CASE)
    width = bench.lm.key_width(1)
    weights = KeyAdapter.initial(width, rank=2, seed=1).weights
    weights = weights._replace(b=torch.randn(width, 2, generator=torch.Generator().manual_seed(2)))
    robust = plain.with_adapters({1: KeyAdapter(weights, tau=0.0)})
    before, after = form_similarities(bench, robust, CASE)["rephrase"]
    located = bench.lm.locate(FACT.prompt, "The Republic of Slovenia")
    key = bench.lm.keys([located.ids], [1], positions=torch.tensor([located.position]))[1][0]
    response = plain.modules[0].vectors["response"]
    assert float(before[0]) == pytest.approx(float(key @ response), rel=1e-4)
    assert float(after[0]) == pytest.approx(float((key + weights.b @ (weights.a @ key)) @ response), rel=1e-4)
