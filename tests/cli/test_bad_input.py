"""Bad input on the command line: one clear sentence, status 1, and earlier results left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rep_fast.models import EditableLM


def refused(done: Any, *words: str) -> None:
    """One sentence with these words, nothing on stdout, no traceback."""
    assert done.code == 1, done.out + done.err
    sentence = done.err.strip().splitlines()[-1]
    assert sentence.startswith("error: "), done.err
    for word in words:
        assert word in sentence
    assert "Traceback" not in done.err
    assert done.out == ""


@pytest.fixture
def copied_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.fixture
def moments_file(rep_fast, tiny_model, corpus, tmp_path) -> Path:
    """Second moments of the tiny model's layer 1."""
    path = tmp_path / "moments.safetensors"
    done = rep_fast("moments", "--model", tiny_model, "--text", corpus, "--layers", "1", "--out", path)
    assert done.code == 0, done.err
    return path


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "word"),
    [
        ("Slovenia belongs to the continent of", "Slovenia", "Asia", "0 '{}'"),
        ("{} and {} belong to the continent of", "Slovenia", "Asia", "2 '{}'"),
        ("{} belongs to the continent of", " ", "Asia", "subject"),
        ("{} belongs to the continent of", "Slovenia", "", "target (target_new) is empty"),
    ],
    ids=["no slot", "two slots", "no subject", "empty target"],
)
def test_prompts_that_cannot_be_edited(rep_fast, tiny_model, prompt, subject, target, word):
    refused(
        rep_fast("edit", "--model", tiny_model, "--prompt", prompt, "--subject", subject, "--target", target, "--json"),
        word,
    )


def test_a_record_whose_prompt_lacks_the_subject(rep_fast, tiny_model, corpus, case_file, settings):
    records = json.loads(case_file.read_text())
    records[1]["subject"] = "Atlantis"
    case_file.write_text(json.dumps(records))
    command = [
        "evaluate",
        "--model",
        tiny_model,
        "--cases",
        case_file,
        "--text",
        corpus,
        "--preset",
        "factworld",
        *settings,
    ]
    refused(rep_fast(*command), "record 1", "Atlantis", "--skip-bad")
    skipped = rep_fast(*command, "--skip-bad", "--json")
    assert skipped.code == 0, skipped.err
    assert skipped.json["cases"] == 2
    assert "skipped 1 of 3" in skipped.err


def test_a_target_the_model_already_says(rep_fast, tiny_model, corpus, settings):
    lm = EditableLM.from_pretrained(tiny_model)
    prompt, target = _answered_prompt(lm)
    command = ["edit", "--model", tiny_model, "--prompt", prompt, "--subject", "Slovenia", "--target", target]
    refused(rep_fast(*command, "--text", corpus, *settings), "already answers")


def _answered_prompt(lm: EditableLM) -> tuple[str, str]:
    """A prompt whose greedy next token is text that is tokenised to that token again."""
    for ending in ("belongs to", "stands in", "is in", "plays", "and", "of the", "continent", "home", "Paris"):
        prompt = f"{{}} {ending}"
        text = prompt.replace("{}", "Slovenia")
        best = int(lm.logits([text])[0, int(lm.encode([text]).lengths[0]) - 1].argmax())
        target = lm.decode([best]).strip()
        if target and lm.answer(text, target).target_ids == (best,):
            return prompt, target
    raise AssertionError("no prompt has an answer of one clean token")


def test_an_unknown_family(rep_fast, copied_model, fact):
    config = json.loads((copied_model / "config.json").read_text())
    config.update(model_type="opt", architectures=["OPTForCausalLM"])
    (copied_model / "config.json").write_text(json.dumps(config))
    refused(rep_fast("trace", "--model", copied_model, *fact), "opt")


def test_moments_of_another_model(rep_fast, build_lm, corpus, fact, settings, moments_file, tmp_path):
    other = tmp_path / "other"
    build_lm("llama", seed=1, max_position_embeddings=1024).save_pretrained(other)
    options = ["--text", corpus, *settings, "--moments", moments_file]
    refused(rep_fast("edit", "--model", other, *fact, *options), "moments")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "renamed", "absent"])
def test_damaged_moments(rep_fast, tiny_model, corpus, fact, settings, moments_file, damage):
    content = moments_file.read_bytes()
    if damage == "truncated":
        moments_file.write_bytes(content[:-100])
    elif damage == "flipped":
        moments_file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "renamed":
        shutil.copy(tiny_model / "model.safetensors", moments_file)
    else:
        moments_file.unlink()
    saved = moments_file.with_name("edit.safetensors")
    saved.write_bytes(b"an earlier result")
    options = ["--text", corpus, *settings, "--moments", moments_file, "--save", saved]
    refused(rep_fast("edit", "--model", tiny_model, *fact, *options), moments_file.name)
    assert saved.read_bytes() == b"an earlier result"


def test_truncated_weights(rep_fast, copied_model, fact):
    weights = copied_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(rep_fast("trace", "--model", copied_model, *fact), str(copied_model))


def test_nan_in_weights(rep_fast, copied_model, fact):
    tensors = load_file(copied_model / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][3, 4] = torch.nan
    save_file(tensors, copied_model / "model.safetensors", metadata={"format": "pt"})
    refused(rep_fast("trace", "--model", copied_model, *fact), name)


def test_a_corpus_shorter_than_the_key_width(rep_fast, tiny_model, fact, settings, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Europe is a continent.")
    refused(rep_fast("edit", "--model", tiny_model, *fact, "--text", short, *settings), "singular", "--tokens")
    kept = tmp_path / "kept.safetensors"
    kept.write_text("an earlier result")
    few = rep_fast("moments", "--model", tiny_model, "--text", short, "--layers", "1", "--out", kept)
    refused(few, "fewer than M", "--tokens")
    assert kept.read_text() == "an earlier result"


def test_no_text_for_a_model_without_its_own(rep_fast, tiny_model, fact, settings):
    refused(rep_fast("edit", "--model", tiny_model, *fact, *settings), "--text")


@pytest.mark.parametrize("command", ["evaluate", "factworld", "demo", "moments", "edit"])
def test_unwritable_output(rep_fast, tiny_model, corpus, case_file, fact, settings, tmp_path, command):
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    place = blocker / "below"
    arguments = {
        "evaluate": ["--model", tiny_model, "--cases", case_file, "--text", corpus, *settings, "--out", place],
        "factworld": ["train", "--facts", case_file, "--out", place],
        "demo": ["--out", place],
        "moments": ["--model", tiny_model, "--text", corpus, "--layers", "1", "--out", place],
        "edit": ["--model", tiny_model, *fact, "--text", corpus, *settings, "--save", place],
    }[command]
    option = "--save" if command == "edit" else "--out"
    refused(rep_fast(command, *arguments), str(place), f"choose another {option}")
    assert blocker.read_text() == "not a directory"


@pytest.mark.parametrize("command", ["moments", "edit"])
def test_a_directory_where_a_file_is_wanted(rep_fast, tiny_model, corpus, fact, settings, tmp_path, command):
    arguments = {
        "moments": ["--text", corpus, "--layers", "1", "--out", tmp_path],
        "edit": [*fact, "--text", corpus, *settings, "--save", tmp_path],
    }[command]
    refused(rep_fast(command, "--model", tiny_model, *arguments), str(tmp_path), "it is a directory")


def test_a_failed_training_leaves_no_directory(rep_fast, case_file, tmp_path):
    out = tmp_path / "new" / "model"
    refused(rep_fast("factworld", "train", "--facts", tmp_path / "absent.json", "--out", out), "absent.json")
    refused(rep_fast("factworld", "train", "--facts", case_file, "--family", "opt", "--out", out), "opt")
    assert not out.parent.exists()


@pytest.mark.parametrize("layer", ["99", "-1", "3"])
def test_layers_the_model_lacks(rep_fast, tiny_model, corpus, case_file, layer):
    options = ["--model", tiny_model, "--text", corpus, f"--layers={layer}"]
    refused(rep_fast("scan", "--cases", case_file, *options), layer)
    refused(rep_fast("moments", *options), layer)


def test_a_model_that_is_not_there(rep_fast, fact, tmp_path):
    refused(rep_fast("trace", "--model", tmp_path / "nowhere", *fact), "nowhere")


def test_a_device_that_is_not_there(rep_fast, tiny_model, fact):
    refused(rep_fast("trace", "--model", tiny_model, *fact, "--device", "warp:7"), "warp:7")
