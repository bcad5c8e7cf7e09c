"""`rep-fast edit` on a tiny random model."""

from __future__ import annotations

import json

import pytest

from rep_fast import Edit
from rep_fast.cli.edit import read_rephrases
from rep_fast.errors import RecordError


def test_prints_one_json_object_and_saves_the_edit(rep_fast, tiny_model, corpus, fact, settings, tmp_path):
    saved = tmp_path / "made" / "for it" / "edit.safetensors"
    done = rep_fast("edit", "--model", tiny_model, *fact, "--text", corpus, *settings, "--save", saved, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["fact"]["subject"] == "Slovenia"
    assert found["layers"] == [1]
    assert found["rep"] is None
    assert {"model", "method", "before", "after", "answers", "timing", "saved"} <= found.keys()
    assert Edit.load(saved).facts[0].target_new == "Antarctica"


def test_exports_a_lora_adapter(rep_fast, tiny_model, corpus, fact, settings, tmp_path):
    place = tmp_path / "made" / "adapter"
    asked = ["edit", "--model", tiny_model, *fact, "--text", corpus, *settings, "--export-peft", place]
    done = rep_fast(*asked, "--json")
    assert done.code == 0, done.err
    assert done.json["exported"] == str(place)
    assert sorted(path.name for path in place.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with_rep = rep_fast(*asked, "--rep")
    assert with_rep.code == 1
    assert "leave --rep or --export-peft out" in with_rep.err


def test_several_layers_are_edited_or_refused(rep_fast, tiny_model, corpus, fact):
    command = ["edit", "--model", tiny_model, *fact, "--text", corpus, "--layers", "0,1", "--set", "v_steps=3"]
    done = rep_fast(*command, "--method", "memit", "--json")
    assert done.code == 0, done.err
    assert done.json["layers"] == [0, 1]
    refused = rep_fast(*command)
    assert refused.code == 1
    assert "rome edits one layer, got [0, 1]; name one" in refused.err


def test_answers_are_as_long_as_asked(rep_fast, tiny_model, corpus, fact, settings):
    command = ["edit", "--model", tiny_model, *fact, "--text", corpus, *settings]
    short, long = rep_fast(*command), rep_fast(*command, "--answer-tokens", "40", "--json")
    assert "Answers are cut after the target's length and two tokens; --answer-tokens N shows more." in short.out
    shortly = rep_fast(*command, "--json").json["answers"]
    assert all(b["before"].startswith(a["before"]) for a, b in zip(shortly, long.json["answers"], strict=True))
    assert sum(len(one["before"]) for one in long.json["answers"]) > sum(len(one["before"]) for one in shortly)


def test_a_directory_that_is_made_is_told_of(rep_fast, tiny_model, corpus, fact, settings, tmp_path):
    command = ["edit", "--model", tiny_model, *fact, "--text", corpus, *settings, "--save", tmp_path / "new" / "edit"]
    assert f"made the directory {tmp_path / 'new'}\n" in rep_fast(*command).err
    assert "made the directory" not in rep_fast(*command).err


def test_fine_tuning_needs_no_moments(rep_fast, tiny_model, fact):
    options = ["--method", "ft-m", "--layers", "1", "--set", "ft_steps=2", "--json"]
    done = rep_fast("edit", "--model", tiny_model, *fact, *options)
    assert done.code == 0, done.err
    assert done.json["method"] == "ft-m"


def test_says_what_rep_was_trained_on(rep_fast, tiny_model, corpus, fact, settings, tmp_path):
    bare = rep_fast("edit", "--model", tiny_model, *fact, "--text", corpus, *settings, "--rep")
    assert bare.code == 0, bare.err
    assert "simple surface forms" in bare.out
    assert "rome+rep" in bare.out
    names = tmp_path / "names.txt"
    names.write_text("the Republic of Slovenia\n\nSlovenija\n")
    given = rep_fast(
        "edit", "--model", tiny_model, *fact, "--text", corpus, *settings,
        "--rep-objective", "paper", "--rephrases", names, "--json",
    )  # fmt: skip
    assert given.code == 0, given.err
    assert given.json["rep"]["objective"] == "paper"
    assert given.json["rep"]["rephrases"] == ["the Republic of Slovenia", "Slovenija"]


@pytest.mark.parametrize(
    "content",
    ["Slovenija\nthe Republic\n", '["Slovenija", "the Republic"]', '{"Slovenia": ["Slovenija", "the Republic"]}'],
)
def test_reads_rephrases_from_lines_and_json(tmp_path, content):
    path = tmp_path / "names"
    path.write_text(content)
    assert read_rephrases(path, "Slovenia") == ["Slovenija", "the Republic"]


@pytest.mark.parametrize("content", ["\n \n", "[1, 2]", '{"Other": ["x"]}', "[unfinished"])
def test_refuses_rephrases_without_names(tmp_path, content):
    path = tmp_path / "names"
    path.write_text(content)
    with pytest.raises(RecordError, match=str(path)):
        read_rephrases(path, "Slovenia")


def test_repeats_itself_with_the_same_seed(rep_fast, tiny_model, corpus, fact, settings):
    command = ["edit", "--model", tiny_model, *fact, "--text", corpus, *settings, "--rep", "--seed", "3", "--json"]
    runs = [rep_fast(*command).json for _ in range(2)]
    for run in runs:
        del run["timing"], run["warnings"]  # a cached second moment warns of nothing
    assert json.dumps(runs[0]) == json.dumps(runs[1])
