"""scan, trace, moments, factworld train, doctor, the help, and what an error looks like."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from rep_fast import SecondMoments
from rep_fast.cli.doctor import _examine, _show
from rep_fast.cli.screen import Screen


def test_scan_lists_collisions_per_subject(rep_fast, tiny_model, corpus, case_file):
    command = ["scan", "--model", tiny_model, "--cases", case_file, "--text", corpus, "--layers", "1", "--top", "3"]
    done = rep_fast(*command, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["layer"] == 1
    assert [own["subject"] for own in found["subjects"]] == ["Slovenia", "Kobe Bryant", "Danielle Darrieux"]
    for own in found["subjects"]:
        rhos = [hit["rho"] for hit in own["collisions"]]
        assert len(rhos) == 3
        assert rhos == sorted(rhos, reverse=True)
        assert all("following" in hit for hit in own["collisions"])
    shown = rep_fast(*command).out
    assert "Strongest collisions" in shown
    best = found["subjects"][0]["collisions"][0]["token"].strip()
    assert f"«{best}»" in shown


def test_trace_gives_the_best_nodes_and_paths(rep_fast, tiny_model, fact):
    done = rep_fast("trace", "--model", tiny_model, *fact, "--top", "5", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert [own["layer"] for own in found["layers"]] == [0, 1, 2]
    for own in found["layers"]:
        scores = [node["score"] for node in own["key"]]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
    best = sum(own[part][0]["score"] for own in found["layers"] for part in ("key", "value"))
    assert found["paths"][0]["score"] == pytest.approx(best)
    assert "best path" in rep_fast("trace", "--model", tiny_model, *fact).out


def test_moments_are_saved_cached_and_used(rep_fast, tiny_model, corpus, fact, settings, tmp_path):
    saved = tmp_path / "moments.safetensors"
    done = rep_fast("moments", "--model", tiny_model, "--text", corpus, "--layers", "1,2", "--out", saved, "--json")
    assert done.code == 0, done.err
    assert [own["layer"] for own in done.json["layers"]] == [1, 2]
    assert all(own["tokens"] == 480 for own in done.json["layers"])  # 10 × M
    assert SecondMoments.load(saved).layers == (1, 2)
    options = ["--text", corpus, *settings, "--moments", saved]
    assert rep_fast("edit", "--model", tiny_model, *fact, *options).code == 0


def test_interrupted_moments_go_on_where_they_stopped(rep_fast, tiny_model, corpus, tmp_path, monkeypatch):
    command = ["moments", "--model", tiny_model, "--text", corpus, "--layers", "1", "--tokens", "full", "--json"]
    reference = rep_fast(*command).json["layers"]

    def interrupt(self, label, done, total):
        raise KeyboardInterrupt

    monkeypatch.setenv("REP_FAST_CACHE", str(tmp_path / "second"))
    with monkeypatch.context() as patched:
        patched.setattr(Screen, "progress", interrupt)
        stopped = rep_fast(*command)
    assert stopped.code == 1
    assert "run the same command to go on" in stopped.err
    assert rep_fast(*command).json["layers"] == reference


def test_factworld_train_makes_a_model_other_commands_take(rep_fast, case_file, tmp_path):
    out = tmp_path / "model"
    sizes = [f"--set={size}" for size in (
        "steps=2", "hidden_size=16", "key_width=32", "layers=2", "heads=2", "batch=2", "length=32", "vocabulary=400",
    )]  # fmt: skip
    done = rep_fast("factworld", "train", "--facts", case_file, "--out", out, *sizes, "--json")
    assert done.code == 0, done.err
    assert done.json["facts"] == 3
    assert 0.0 <= done.json["recall"] <= 1.0
    weights = (out / "model.safetensors").read_bytes()
    again = rep_fast("factworld", "train", "--facts", case_file, "--out", out, *sizes)
    assert again.code == 1
    assert "--force" in again.err
    assert (out / "model.safetensors").read_bytes() == weights
    # its own records and text are found without being named
    scanned = rep_fast("scan", "--model", out, "--tokens", "500", "--json")
    assert scanned.code == 0, scanned.err
    assert len(scanned.json["subjects"]) == 3


def test_doctor_says_what_the_gpu_side_has_and_lacks():
    def told(changed):
        names = ("torch_built_for", "available", "devices", "kernels", "nvcc", "backend")
        cuda = dict(zip(names, ("13.0", False, [], {"available": False, "reason": "not built"}, None, []), strict=True))
        console = Console(record=True, width=200, file=io.StringIO())
        _show(SimpleNamespace(show=console.print), _examine() | {"cuda": cuda | changed})
        return console.export_text()

    assert "this torch is built without CUDA; everything runs on the CPU" in told({"torch_built_for": None})
    assert "torch (CUDA 13.0) finds no device or no driver" in told({})
    assert "a build here leaves the CUDA kernels out" in told({})
    old = {"whitened_topk": {"body": "reference", "reason": "this GPU is sm_75, and the CUDA kernels need sm_80"}}
    shown = told({"available": True, "devices": ["Tesla T4"], "backend": [old]})
    assert "Operations on tensors on cuda:0, Tesla T4" in shown
    assert "this GPU is sm_75" in shown
    assert "not built" in shown


def test_doctor_names_the_body_of_every_operation(rep_fast):
    found = rep_fast("doctor", "--json").json
    assert {"whitened_topk", "gated_adapter", "packed_scores", "accumulate_moment", "spd_solver"} <= found[
        "backend"
    ].keys()
    assert all(own["reason"] for own in found["backend"].values())
    assert "whitened_topk" in rep_fast("doctor").out


def test_help_needs_no_torch():
    program = (
        "import sys; from typer.testing import CliRunner; from rep_fast.cli import app\n"
        "done = CliRunner().invoke(app, ['--help'])\n"
        "assert done.exit_code == 0 and 'evaluate' in done.stdout\n"
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_installed_command_keeps_stdout_for_json():
    program = "from rep_fast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor", "--json"], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["rep_fast"]


def test_a_defect_is_one_sentence_and_a_traceback_on_request(rep_fast, tiny_model, fact, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the wheels came off\nsecond line")

    monkeypatch.setattr("rep_fast.paths.score_nodes", broken)
    command = ["trace", "--model", tiny_model, *fact]
    done = rep_fast(*command)
    assert done.code == 1
    assert done.err.strip().splitlines() == [
        "unexpected error: RuntimeError: the wheels came off; run again with --debug to see where"
    ]
    assert "Traceback" in rep_fast(*command, "--debug").err
