"""The workbench: what it shares, what its columns are called, and where text and negatives come from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import rep_fast
from rep_fast import api, factworld
from rep_fast.editors import EditorState, RomeHparams
from rep_fast.edits import KeyAdapter
from rep_fast.errors import FingerprintError, HparamError, TextSourceError
from rep_fast.facts import EditCase, Fact, MemoryText, Sided
from rep_fast.models import EditableLM
from rep_fast.rep import SubjectForms, training
from rep_fast.rep.training import cache_keys
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


def test_rep_takes_the_settings_of_the_edit_s_method(bench: api.Workbench) -> None:
    bench.preset = dataclasses.replace(
        bench.preset,
        sections={**bench.preset.sections, "rep-paper": {"steps": 5, "by_method": {"memit": {"target": "raw"}}}},
    )
    assert bench.rep_hparams("paper").target == "whitened"
    assert bench.rep_hparams("paper", method="memit").target == "raw"
    found = bench.settings(["rome", "memit"], [None, "paper"])
    assert found["rep[paper]"]["target"] == "whitened"
    assert found["rep[paper] on memit"]["target"] == "raw"
    assert "rep[paper] on rome" not in found
    plain = bench.edit(FACT, method="rome")
    for method, target in (("rome", "whitened"), ("memit", "raw")):
        adapted = bench.with_rep(dataclasses.replace(plain, method=method), FACT, objective="paper")
        assert adapted.modules[0].adapters[0].notes["hparams"]["target"] == target


def test_methods_without_a_key_get_no_column_with_rep(bench: api.Workbench) -> None:
    assert list(bench.columns(["kn", "memit"], [None, True])) == ["kn", "memit", "memit+rep"]
    with pytest.raises(HparamError, match="kn has none; choose from rome, r-rome, memit"):
        bench.columns(["kn"], [True])


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


FIVE = [
    dataclasses.replace(CASE, case_id=number, fact=Fact("{} belongs to the continent of", subject, target))
    for number, (subject, target) in enumerate(
        [
            ("Slovenia", "Antarctica"),
            ("Danielle Darrieux", "Asia"),
            ("Michael Jordan", "Africa"),
            ("Kobe Bryant", "Asia"),
            ("Mount Triglav", "Antarctica"),
        ]
    )
]


@pytest.mark.parametrize("objective", [None, "paper", "calibrated"])
def test_five_edits_in_sequence_each_hold_when_they_are_made(
    build_lm: Any, tmp_path: Path, objective: str | None
) -> None:
    """Each edit is made on the model with the earlier deltas and adapters: its own value is met on top of them."""
    lm = build_lm("llama", dtype=torch.float64)
    clean = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    # a gate that is nearly always open: the adapters before an edit matter to its key
    overrides = {**SMALL, "tau": 0.01, "lr": 0.05}
    bench = api.Workbench(lm, text=TEXT, overrides=overrides, cache_dir=tmp_path)
    (write,) = bench.steps(["rome"], [objective]).values()
    active: list[Any] = []
    for case in FIVE:
        made = write([case], 0, tuple(active))
        made.apply(lm)
        active.append(made)
        found = lm.locate(case.fact.prompt, case.fact.subject)
        with torch.no_grad():
            value = lm.read([list(found.ids)], [("value", 1)])["value", 1][0, found.position]
        # the paper's adapter may move the edited prompt's own key, the calibrated one is kept from it
        if objective != "paper":
            torch.testing.assert_close(value, made.tensors["v_star"], rtol=1e-5, atol=1e-5)
    assert sum(len(edit.modules[0].adapters) for edit in active) == (0 if objective is None else 5)
    while lm.active_edits:
        lm.active_edits[-1].undo()
    assert all(torch.equal(clean[name], tensor) for name, tensor in lm.model.state_dict().items())
    alone = bench.edit(FIVE[-1], rep=objective or False)
    assert not torch.equal(alone.modules[0].delta.left, active[-1].modules[0].delta.left)


def test_an_adapter_is_trained_on_the_keys_that_earlier_adapters_leave(build_lm: Any, tmp_path: Path) -> None:
    lm = build_lm("llama", dtype=torch.float64)
    bench = api.Workbench(lm, text=TEXT, overrides=SMALL, cache_dir=tmp_path)
    write = bench.steps(["rome"], ["paper"])["rome+rep[paper]"]
    first = write([FIVE[0]], 0, ())
    start = KeyAdapter.initial(lm.key_width(1), rank=2, tau=0.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(start.weights.b.shape, generator=generator, dtype=torch.float64)
    moving = KeyAdapter(start.weights._replace(b=b), tau=0.0)
    templates, hparams = bench.templates("rome", 0), bench.rep_hparams("paper")
    forms = SubjectForms.of_case(lm, FIVE[1], seed=0)
    second = bench.edit(FIVE[1])
    options = {"templates": templates, "hparams": hparams, "seed": 0}
    native = cache_keys(lm, second, 1, forms, None, **options)
    with first.with_adapters({1: moving}).applied(lm):
        seen = cache_keys(lm, second, 1, forms, None, **options)
    torch.testing.assert_close(seen.positives, moving(native.positives), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.anchor, moving(native.anchor), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(seen.anchor, native.anchor, rtol=1e-2)


def test_steps_of_several_records_go_to_the_editor_as_a_whole(bench: api.Workbench, monkeypatch: Any) -> None:
    steps = bench.steps(["rome"], [None, True])
    assert list(steps) == ["rome", "rome+rep"]
    with pytest.raises(HparamError, match="rome writes one fact at a time, got 5"):
        steps["rome"](FIVE, 0, ())
    with pytest.raises(HparamError, match="REP trains an adapter for one record, this step has 5"):
        steps["rome+rep"](FIVE, 0, ())
    written = {}
    fake = api.editors.Editor(
        "rome", RomeHparams, lambda lm, facts, *, method, **_: written.setdefault(method, facts), is_batch=True
    )
    monkeypatch.setattr(api.editors, "get", lambda name: fake)
    assert steps["rome"](FIVE, 0, ()) == [case.fact for case in FIVE] == written["rome"]


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


@pytest.mark.parametrize(("method", "vector"), [("rome", "direction"), ("emmet", "k_star")])
def test_the_parity_preset_trains_on_the_target_of_its_method(
    tiny_llama: EditableLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, vector: str
) -> None:
    seen: list[torch.Tensor] = []
    keep = training.fit

    def noting(weights: Any, keys: training.CachedKeys, hparams: Any, *, seed: int) -> Any:
        seen.append(keys.target)
        return keep(weights, keys, hparams, seed=seed)

    monkeypatch.setattr(training, "fit", noting)
    overrides = {"layer": 1, "v_steps": 2, "rank": 2, "steps": 1}
    bench = api.Workbench(tiny_llama, text=TEXT, preset="rep-official", overrides=overrides, cache_dir=tmp_path)
    wanted = bench.edit(FIVE[0], method=method, rep=True).modules[0].vectors[vector]
    torch.testing.assert_close(seen, [wanted / wanted.norm() if vector == "direction" else wanted])


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


OTHER = Fact("The mother tongue of {} is", "Danielle Darrieux", "Korean")


def test_batch_methods_take_several_facts_and_layers(tiny_llama: EditableLM, tmp_path: Path) -> None:
    changes = {"v_steps": 2, "early_stop": None, "null_share": 0.5, "nullspace_threshold": None}
    bench = api.Workbench(tiny_llama, text=TEXT, overrides=changes, layer=(0, 1), cache_dir=tmp_path)
    assert bench.layers("alphaedit") == (0, 1)
    bench.prepare(["alphaedit"], rep=False)
    assert len(list(tmp_path.glob("null-spaces/*"))) == 2
    edit = bench.edit([CASE, OTHER], method="alphaedit")
    assert edit.layers == (0, 1)
    assert edit.facts == (FACT, OTHER)
    past = bench.edit([OTHER], method="alphaedit", state=EditorState.of([edit]))
    fresh = bench.edit(OTHER, method="alphaedit")
    assert not torch.equal(past.modules[0].delta.right, fresh.modules[0].delta.right)  # type: ignore[union-attr]
    with pytest.raises(HparamError, match="REP trains the adapters of one fact, got 2"):
        bench.edit([CASE, OTHER], method="alphaedit", rep=True)
    with pytest.raises(HparamError, match="one fact at a time, got 2"):
        api.Workbench(tiny_llama, text=TEXT, layer=1).edit([CASE, OTHER])


def test_path_editing_takes_all_layers_and_needs_no_text(
    tiny_llama: EditableLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = api.Workbench(tiny_llama, overrides={"pac_epochs": 1})
    monkeypatch.setattr(bench, "moments", lambda layers: pytest.fail("path editing has no second moments"))
    assert bench.layers("pac") == (0, 1, 2)
    assert bench.layer("pac") == 2
    bench.prepare(["pac"], rep=[None])
    assert bench.edit([FACT], method="pac").layers == (0, 1, 2)


def test_steps_hand_past_keys_on(tiny_llama: EditableLM, tmp_path: Path) -> None:
    """A stacking regime gives each step the edits that stand; methods with a memory take their keys."""
    changes = {"v_steps": 2, "early_stop": None, "mom2_update_weight": 5.0}
    bench = api.Workbench(tiny_llama, text=TEXT, overrides=changes, layer=(0, 1), cache_dir=tmp_path)
    step = bench.steps(["memit-cache"], [None])["memit-cache"]
    second = EditCase(4, OTHER)
    first = step([CASE], 0, [])
    with first.applied(tiny_llama):
        later = step([second], 0, [first])
        wanted = bench.edit(second, method="memit-cache", state=EditorState.of([first]))
        forgetful = bench.edit(second, method="memit-cache")
    assert torch.equal(later.modules[1].delta.right, wanted.modules[1].delta.right)  # type: ignore[union-attr]
    assert not torch.equal(later.modules[1].delta.right, forgetful.modules[1].delta.right)  # type: ignore[union-attr]


@pytest.mark.parametrize("objective", ["paper", "calibrated"])
def test_a_resumed_step_trains_an_adapter_over_the_edits_that_stand(
    build_lm: Any, tmp_path: Path, objective: str
) -> None:
    """MEMIT draws templates of its own style; those of the adapters cannot be drawn once edits are active."""
    lm = build_lm("llama", dtype=torch.float64)
    before = api.Workbench(lm, text=TEXT, overrides=SMALL, cache_dir=tmp_path / "before")
    first = before.edit(FIVE[0], method="memit")
    resumed = api.Workbench(lm, text=TEXT, overrides=SMALL, cache_dir=tmp_path / "resumed")
    (write,) = resumed.steps(["memit"], [objective]).values()
    with first.applied(lm):
        made = write([FIVE[1]], 0, (first,))
    assert [len(module.adapters) for module in made.modules] == [1]


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
