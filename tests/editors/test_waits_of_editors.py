"""Editors' loops hand their work to a device without waiting for it, and learn of their end a step late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_devices import held, waits_of
from test_no_waits import FACTS, TEMPLATES, TEXT

from rep_fast import editors
from rep_fast.edits import Edit
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.ops import arriving
from rep_fast.stats import SecondMoments

SHORT = Fact("The mother tongue of {} is", "Danielle Darrieux", "the", "French")  # one token
PAC = {"layers": [0, 1], "top": 3, "pac_lr": 0.02}
# method, what all runs share, and what makes a loop go on for longer
STEPS: dict[str, tuple[str, dict[str, Any], dict[str, Sequence[Any]]]] = {
    "ft": ("ft", {"layers": [0, 1]}, {"ft_steps": (2, 6)}),
    "ft-l": ("ft-l", {"layers": [1]}, {"ft_steps": (2, 6)}),
    "ft-c": ("ft-c", {"layers": [1]}, {"ft_steps": (2, 6)}),
    "ft-m": ("ft-m", {"layers": [1], "ft_batch": 2}, {"ft_steps": (2, 6)}),
    "adalora": ("lora", {"layers": [1], "lora_batch": 2}, {"lora_steps": (2, 6)}),
    "lora": ("lora", {"layers": [1], "lora_kind": "lora"}, {"lora_steps": (2, 6)}),
    "wise": ("wise", {"layer": 1}, {"n_iter": (2, 6)}),
    "grace": ("grace", {"layer": 1, "early_stop": 0.01}, {"n_iter": (2, 6)}),
    "pac": ("pac", PAC, {"pac_epochs": (2, 6)}),
    "pac, all facts": ("pac", {**PAC, "trace_scope": "dataset", "early_stop": None}, {"pac_epochs": (2, 6)}),
    "kn": ("kn", {"layers": [0, 1], "kn_threshold": 0.0}, {"kn_steps": (2, 6), "kn_prompts": (1, 3)}),
}


def made(lm: EditableLM, method: str, settings: dict[str, Any], facts: Sequence[Fact]) -> Edit:
    editor = editors.get(method)
    options: dict[str, Any] = {"hparams": editor.hparams(lm, overrides=settings)}
    if "templates" in editor.takes:
        options["templates"] = TEMPLATES
    return editor(lm, facts if editor.is_batch else facts[:1], **options)


@pytest.mark.parametrize("case", list(STEPS))
def test_steps(build_lm: Any, case: str) -> None:
    method, settings, longer = STEPS[case]
    short, long = (
        waits_of(lm := build_lm("llama"), lambda lm=lm, n=n: made(
            lm, method, settings | {name: values[n] for name, values in longer.items()}, FACTS)
        )
        for n in (0, 1)
    )  # fmt: skip
    assert short == long


@pytest.mark.parametrize("method", ["ft-m", "wise", "grace"])
def test_facts(build_lm: Any, method: str) -> None:
    """Also where each is trained for itself."""
    settings = {"layer": 1} | ({"ft_steps": 2} if method == "ft-m" else {"n_iter": 2})
    one, three = (
        waits_of(lm := build_lm("llama"), lambda lm=lm, n=n: made(lm, method, settings, FACTS[:n])) for n in (1, 3)
    )
    assert one == three


@pytest.mark.parametrize("method", ["memit", "memit-cache", "emmet", "pmet", "alphaedit"])
def test_layers_of_a_batch(build_lm: Any, tmp_path: Path, method: str) -> None:
    """A layer's update is checked once, its system and its factors; C lies on the host here, and keys go there and
    back. Facts make no difference."""
    editor = editors.get(method)

    def waits(layers: list[int], n_facts: int) -> dict[str, int]:
        lm = build_lm("llama")
        settings = {"layers": layers, "v_steps": 2} | ({"null_share": 0.5} if method == "alphaedit" else {})
        if method == "alphaedit":
            settings["nullspace_threshold"] = None
        options: dict[str, Any] = {
            "moments": SecondMoments.collect(lm, TEXT, [0, 1, 2], tokens=200, cache_dir=tmp_path),
            "hparams": editor.hparams(lm, overrides=settings),
            "templates": TEMPLATES,
        }
        return waits_of(lm, lambda: editor(lm, FACTS[:n_facts], cache_dir=tmp_path, **options))

    one, three = waits([1], 3), waits([0, 1, 2], 3)
    assert sum(three.values()) - sum(one.values()) <= 2 * 4
    assert waits([0, 1], 3) == waits([0, 1], 2)


def parts_of(edit: Edit) -> dict[str, torch.Tensor]:
    kinds = [(module.place, kind) for module in edit.modules for kind in (module.delta, module.replacement) if kind]
    return {f"{place} {name}": part for place, kind in kinds for name, part in kind.parts().items()}


def steps_of(edit: Edit) -> int:
    """Of the training, of the shortest one where there are several."""
    notes = edit.notes
    return notes["epochs"] if "epochs" in notes else min(notes.get("forwards", [len(notes.get("losses", []))]))


# trainings that end by themselves, after other numbers of steps for other facts
ENDING: dict[str, tuple[str, dict[str, Any]]] = {
    "ft-m": ("ft-m", {"layers": [1], "ft_steps": 60, "ft_lr": 2e-2}),
    "ft-m, batch": ("ft-m", {"layers": [2, 0], "ft_steps": 60, "ft_lr": 2e-2, "ft_batch": 2}),
    "grace": ("grace", {"layer": 1, "n_iter": 60, "early_stop": 1.0}),
    "wise": ("wise", {"layer": 1, "n_iter": 60, "edit_lr": 0.05, "stop_loss": 60.0, "stop_change": 0.05}),
    "pac": ("pac", {**PAC, "pac_epochs": 40, "early_stop": 6.0}),
    "pac, dense": ("pac", {**PAC, "pac_epochs": 40, "early_stop": 6.0, "adam_state": "dense_parity"}),
    "pac, traced again": (
        "pac", {**PAC, "pac_epochs": 40, "early_stop": 6.0, "trace_scope": "batch", "pac_batch": 2, "retrace": 1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ENDING))
def test_a_late_host_gets_the_same_edit(build_lm: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Bit for bit: what is queued after the end, and batches that are left alone, change nothing."""
    method, settings = ENDING[case]
    found = []
    for lag in (0, 1):
        monkeypatch.setattr(arriving, "lag_on", lambda _, lag=lag: lag)
        lm = build_lm("llama")
        with torch.no_grad():
            lm.head.weight.mul_(8)  # a tiny model says nothing with certainty
        found.append(made(lm, method, settings, [*FACTS, SHORT]))
    at_once, late = found
    assert steps_of(at_once) < settings.get("pac_epochs", 60)
    assert late.notes == at_once.notes
    assert parts_of(late).keys() == parts_of(at_once).keys()
    for name, part in parts_of(at_once).items():
        assert torch.equal(parts_of(late)[name], part), name


def test_what_a_device_gives_is_what_the_cpu_gives(build_lm: Any) -> None:
    """Where batches are left alone the count of steps is the device's own; it is looked up, not read."""
    method, settings = ENDING["ft-m"]
    edits = []

    def run(lm: EditableLM) -> None:
        with torch.no_grad():
            lm.head.weight.mul_(8)
        edits.append(made(lm, method, settings | {"ft_steps": 21}, [*FACTS, SHORT]))

    run(build_lm("llama", attention="eager"))
    lm = build_lm("llama", attention="eager")
    waits_of(lm, lambda: run(lm))
    one, other = (edit.module(1).delta.to_dense() for edit in edits)
    assert edits[0].notes["updates"] == edits[1].notes["updates"] < 21 * 4
    torch.testing.assert_close(held(other), held(one), rtol=1e-3, atol=1e-3 * float(one.abs().max()))
