"""`rep-fast edits` on edits of a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rep_fast.edits import Codebook, Edit, ModuleEdit, rect
from rep_fast.facts import Fact
from rep_fast.models import EditableLM


@pytest.fixture
def saved(rep_fast, tiny_model, corpus, settings, tmp_path) -> list[Path]:
    """Two saved edits, the second with an adapter."""
    files = []
    for number, (subject, more) in enumerate((("Slovenia", []), ("Kobe Bryant", ["--rep"]))):
        file = tmp_path / f"edit{number}.safetensors"
        done = rep_fast(
            "edit", "--model", tiny_model, "--prompt", "{} belongs to the continent of", "--subject", subject,
            "--target", "Antarctica", "--text", corpus, *settings, "--save", file, *more,
        )  # fmt: skip
        assert done.code == 0, done.err
        files.append(file)
    return files


def test_show_list_and_diff(rep_fast, saved):
    shown = rep_fast("edits", "show", saved[1])
    assert shown.code == 0, shown.err
    assert "Kobe Bryant belongs to the continent of → Antarctica" in shown.out
    assert "low_rank" in shown.out
    found = rep_fast("edits", "show", saved[1], "--json").json
    assert found["facts"][0]["subject"] == "Kobe Bryant"
    assert found["modules"][0]["adapters"][0]["trained_for"] == ["Kobe Bryant"]
    listed = rep_fast("edits", "list", saved[0].parent, "--json").json
    assert [one["facts"][0]["subject"] for one in listed["edits"]] == ["Slovenia", "Kobe Bryant"]
    assert listed["is_stack"] is False
    different = rep_fast("edits", "diff", *saved, "--json").json
    assert different["only_first"][0]["subject"] == "Slovenia"
    assert different["modules"][0]["adapters"] == [0, 1]
    assert -1 <= different["modules"][0]["cosine"] <= 1
    same = rep_fast("edits", "diff", saved[0], saved[0], "--json").json
    assert same["modules"][0]["cosine"] == pytest.approx(1.0)
    assert same["only_first"] == same["only_second"] == []


def test_what_replaces_outputs_is_shown_like_a_delta(rep_fast, tmp_path):
    book = Codebook(torch.zeros(1, 6), torch.zeros(1, 4), ("Asia",), (1.0,))
    fact = Fact("{} lies in", "Slovenia", "Asia", "Europe")
    Edit((fact,), "grace", {}, "f" * 64, (ModuleEdit(2, replacement=book),)).save(tmp_path / "edit")
    assert "codebook" in rep_fast("edits", "show", tmp_path / "edit").out
    (module,) = rep_fast("edits", "show", tmp_path / "edit", "--json").json["modules"]
    assert (module["delta"], module["replacement"], module["shape"], module["numbers"]) == (
        None,
        "codebook",
        [4, 6],
        10,
    )


def test_stack_ask_and_undo(rep_fast, saved, tiny_model, tmp_path):
    place = tmp_path / "stack"
    prompt = "Slovenia belongs to the continent of"
    assert rep_fast("edits", "stack", place, *saved).code == 0
    assert len(rep_fast("edits", "list", place, "--json").json["edits"]) == 2
    asked = rep_fast("edits", "ask", place, prompt, "--model", tiny_model, "--json").json
    assert asked["edits"] == 2
    alone = rep_fast("edits", "ask", saved[0], prompt, "--model", tiny_model, "--json").json
    assert alone["answers"][0]["before"] == asked["answers"][0]["before"]
    undone = rep_fast("edits", "undo", place, "--number", "1", "--json").json
    assert Path(undone["undone"]).is_file()
    assert [one["facts"][0]["subject"] for one in rep_fast("edits", "list", place, "--json").json["edits"]] == [
        "Kobe Bryant"
    ]
    assert rep_fast("edits", "stack", place, saved[0]).code == 0


def test_mistakes_are_one_sentence(rep_fast, saved, tiny_model, tmp_path):
    place = tmp_path / "stack"
    unknown = rep_fast("edits", "stack", place, saved[0], "--compose", "mix")
    assert (unknown.code, unknown.err) == (1, "error: --compose 'mix' is unknown; choose from chain, argmax, sum\n")
    assert rep_fast("edits", "stack", place, saved[0]).code == 0
    assert rep_fast("edits", "stack", place, saved[1], "--compose", "sum").code == 2
    for arguments, message in (
        (("show", tmp_path / "none"), "there is no edit file"),
        (("list", tmp_path / "cache"), "there are no edits in"),
        (("undo", place, "--number", "7"), "there is no number 7"),
        (("undo", tmp_path / "nothing"), "there is no stack of edits"),
        (("ask", place, "x", "--model", "factworld"), "made for"),
    ):
        done = rep_fast("edits", *arguments)
        assert done.code == 1
        assert message in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize("how", ["prune", "rect:40"])
def test_transform_makes_one_edit_of_a_stack(rep_fast, saved, tiny_model, tmp_path, how):
    place = tmp_path / "stack"
    assert rep_fast("edits", "stack", place, *saved).code == 0
    done = rep_fast("edits", "transform", place, how, "--model", tiny_model, "--save", tmp_path / "one", "--json")
    assert done.code == 0, done.err
    assert done.json["edits"] == 2
    made, first = Edit.load(tmp_path / "one"), Edit.load(saved[0])
    assert [fact.subject for fact in made.facts] == ["Slovenia", "Kobe Bryant"]
    if how == "rect:40":
        lm = EditableLM.from_pretrained(tiny_model)
        wanted = sum(rect(Edit.load(path), lm, share=0.4).modules[0].delta.to_dense() for path in saved)
        assert torch.equal(made.modules[0].delta.to_dense(), wanted)
        assert made.notes["transform"] == how
    else:
        assert how in made.notes
    assert len(made.modules[0].adapters) == 1
    assert first.fingerprint == made.fingerprint


def test_an_unknown_transform_is_one_sentence(rep_fast, saved, tiny_model, tmp_path):
    done = rep_fast("edits", "transform", saved[0], "shrink", "--model", tiny_model, "--save", tmp_path / "one")
    assert (done.code, (tmp_path / "one").exists()) == (1, False)
    assert "transform 'shrink' is unknown; write prune, prune:1.2, rect or rect:40" in done.err
