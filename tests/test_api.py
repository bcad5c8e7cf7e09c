"""The workbench: what it shares, what its columns are called, and where text and negatives come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rep_fast
from rep_fast import api, factworld
from rep_fast.errors import FingerprintError, HparamError, TextSourceError
from rep_fast.facts import EditCase, Fact, MemoryText, Sided
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
CASE = EditCase(3, FACT, subject_rephrases=Sided(("The Republic of Slovenia",), ("Slovenija",)))
TEXT = MemoryText(
    "sports",
    [
        f"Player {i} called Kobe Bryant{i} plays basketball in Los Angeles and Paris {i * 7}. I think so."
        for i in range(60)
    ],
)
SMALL = {
    "v_steps": 3,
    "early_stop": None,
    "steps": 3,
    "rank": 2,
    "n_subjects": 3,
    "n_hard": 8,
    "n_random": 8,
    "layer": 1,
}


@pytest.fixture
def bench(tiny_llama: EditableLM, tmp_path: Path) -> api.Workbench:
    return api.Workbench(tiny_llama, text=TEXT, overrides=SMALL, cache_dir=tmp_path)


def test_columns_share_the_plain_edit(bench: api.Workbench) -> None:
    columns = bench.columns(["rome", "r-rome"], [None, True, "paper"])
    assert list(columns) == ["rome", "rome+rep", "rome+rep[paper]", "r-rome", "r-rome+rep", "r-rome+rep[paper]"]
    plain, adapted, paper = (columns[name](CASE, 0) for name in list(columns)[:3])
    assert plain.modules[0].adapters == ()
    for other, objective in ((adapted, "calibrated"), (paper, "paper")):
        assert other.modules[0].delta is plain.modules[0].delta
        (adapter,) = other.modules[0].adapters
        assert adapter.notes["hparams"]["objective"] == objective
        assert adapter.notes["hparams"]["steps"] == 3
    assert columns["rome"](CASE, 0) is plain
    assert columns["rome"](CASE, 1) is not plain


@pytest.mark.parametrize(
    ("rep", "gathered"),
    [
        (False, False),
        (True, True),
        ("calibrated", True),
        ("paper", False),
        ([None], False),
        ([None, "paper"], False),
        ([None, "paper", "calibrated"], True),
        ([None, True], True),
    ],
)
def test_negatives_are_gathered_for_the_calibrated_objective_alone(
    bench: api.Workbench, monkeypatch: pytest.MonkeyPatch, rep: Any, gathered: bool
) -> None:
    layers: list[int] = []
    monkeypatch.setattr(bench, "negative_pool", layers.append)
    bench.prepare(["rome"], rep=rep)
    assert layers == ([1] if gathered else [])


def test_negatives_follow_the_objective_of_the_preset(tiny_llama: EditableLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = api.Workbench(tiny_llama, text=TEXT, preset="rep-official", overrides={"layer": 1})
    monkeypatch.setattr(bench, "negative_pool", lambda layer: pytest.fail("the paper's objective has no negatives"))
    bench.prepare(["rome"], rep=True)


def test_settings_name_every_hyper_parameter(bench: api.Workbench) -> None:
    settings = bench.settings(["rome"], [None, True])
    assert settings["rome"]["v_steps"] == 3
    assert settings["rep[calibrated]"]["n_hard"] == 8
    assert settings["preset"] == "default"


def test_one_call_form_takes_the_moments_it_is_given(tiny_llama: EditableLM, tiny_gpt2: EditableLM) -> None:
    width = tiny_llama.key_width(1)
    eye = torch.eye(width, dtype=torch.float64)
    moments = SecondMoments.from_matrices({1: eye}, {1: 999}, corpus="none", fingerprint=tiny_llama.fingerprint)
    edit = rep_fast.edit(tiny_llama, [FACT], moments=moments, layer=1, v_steps=2, early_stop=None)
    torch.testing.assert_close(edit.modules[0].vectors["direction"].norm() > 0, torch.tensor(True))
    with pytest.raises(FingerprintError):
        rep_fast.edit(tiny_gpt2, [FACT], moments=moments, layer=1)
    with pytest.raises(HparamError, match="one fact at a time, got 0"):
        rep_fast.edit(tiny_llama, [])
    with pytest.raises(HparamError, match="no hyper-parameter 'v_stepz'"):
        rep_fast.edit(tiny_llama, [FACT], moments=moments, v_stepz=2)


def test_a_bare_fact_gets_surface_forms_or_the_names_it_is_given(bench: api.Workbench) -> None:
    by_itself = bench.edit(FACT, rep=True)
    assert by_itself.modules[0].adapters[0].notes["forms"] == "surface forms"
    given = bench.edit(FACT, rep=True, rephrases=["The Republic of Slovenia"])
    assert given.modules[0].adapters[0].notes["forms"] == "given"


def test_unknown_objective_and_text(bench: api.Workbench, tiny_llama: EditableLM) -> None:
    with pytest.raises(HparamError, match="objective 'papers' is unknown"):
        bench.rep_hparams("papers")
    with pytest.raises(TextSourceError, match="has no text of its own; name one with --text"):
        _ = api.Workbench(tiny_llama).text


def test_a_world_has_its_own_text_and_negatives(tiny_llama: EditableLM, monkeypatch: Any) -> None:
    world = factworld.World.generate()
    monkeypatch.setattr(factworld, "world_of", lambda name: world)
    bench = api.Workbench(tiny_llama, overrides={"layer": 1})
    assert bench.preset.name == "factworld"
    assert bench.text.name != bench.context_text.name
    background = {person.name for person in world.group("background")}
    assert set(bench.negative_pool(1).subjects) <= background


def test_negatives_never_come_from_what_is_evaluated(tiny_llama: EditableLM, monkeypatch: Any) -> None:
    """Neither the embedded evaluation subjects nor a record file's own texts reach the gate's negatives."""
    world = factworld.World.generate()
    people = [person for person in world.people if person.group != "background"]
    aside = factworld.WorldText(world.background(), factworld.TEXT_SEED)
    text = " ".join(aside[index] for index in range(200))
    assert not [name for person in people for name in (person.name, *person.aliases) if name in text]
    records = factworld.RecordWorld.from_cases([CASE])
    monkeypatch.setattr(factworld, "world_of", lambda name: records)
    pool = api.Workbench(tiny_llama, overrides={"layer": 1}).negative_pool(1)
    told = " ".join((CASE.fact.text, *CASE.neighborhood_prompts, *CASE.subject_rephrases))
    assert not [subject for subject in pool.subjects if subject in told]
    words = tiny_llama.decode(pool.corpus.token_ids.tolist())
    assert "Slovenija" not in words
    assert pool.held_out is not None
    assert len(pool.held_out.keys) == len(pool.corpus.keys) // 10
