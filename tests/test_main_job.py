"""The main job on the shipped model: it knows its facts, edits hold, REP makes them robust, undo leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rep_fast import api, factworld
from rep_fast.evaluation import Protocol, evaluate_single
from rep_fast.models import EditableLM

N_CASES = 8


@pytest.fixture(scope="module")
def lm() -> EditableLM:
    return factworld.load()


def test_the_shipped_model_knows_its_facts(lm: EditableLM) -> None:
    world = factworld.World.generate()
    assert factworld.recall(lm, list(world.facts())) >= 0.99


def test_shipped_files_are_small() -> None:
    weights = Path(factworld.__file__).parent / "weights" / "llama"
    assert sum(path.stat().st_size for path in weights.iterdir()) < 6_000_000


def test_rep_makes_edits_hold_under_other_names(lm: EditableLM, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    bench = api.Workbench(lm, cache_dir=tmp_path)
    summary = evaluate_single(
        lm,
        factworld.cases("validation")[:N_CASES],
        bench.columns(["rome"], [None, True]),
        seeds=[0],
        text=bench.context_text,
        protocol=Protocol.of_preset(bench.preset),
    )
    plain, robust = summary["rome"], summary["rome+rep"]
    assert plain["success"].mean >= 75
    assert robust["success"].mean >= plain["success"].mean - 100 / N_CASES
    # 40 prompts each: a gain of 10 points is four of them
    assert robust["rephrase_id"].mean >= plain["rephrase_id"].mean + 10
    assert robust["rephrase_ood"].mean >= plain["rephrase_ood"].mean + 5
    assert robust["locality"].mean >= plain["locality"].mean - 5
    assert not lm.active_edits
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
