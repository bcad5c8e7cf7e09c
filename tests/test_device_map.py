"""A model spread over two devices by accelerate edits, trains and scans as on one, each layer's tensors at its home.

The devices exist in name only, see `pretend_devices`: an operation on tensors of both is refused as on two GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_devices import FIRST, SECOND, PretendDevices, held
from test_no_waits import FACTS, TEMPLATES, TEXT, Inline, topk_on_device

from rep_fast import api, editors, ops
from rep_fast.collisions import scan
from rep_fast.edits import Edit
from rep_fast.errors import LayerError, ModelLoadError
from rep_fast.evaluation.scoring import score_targets
from rep_fast.facts import EditCase, MemoryText, Sided
from rep_fast.models import EditableLM, loading
from rep_fast.paths import score_nodes
from rep_fast.stats import SecondMoments, collecting

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

HOMES = {0: FIRST, 1: SECOND, 2: SECOND}
PROMPT = [fact.text for fact in FACTS]


def spread(lm: EditableLM) -> None:
    """The first layer and all that is not a layer on FIRST, as tied heads are; the other layers on SECOND."""
    base = lm.layout.base
    others = [f"{base}.{name}" for name, _ in lm.model.get_submodule(base).named_children()] + [lm.layout.head]
    layers = {f"{lm.layout.layers}.{layer}": str(home) for layer, home in HOMES.items()}
    accelerate.dispatch_model(lm.model, {name: str(FIRST) for name in others if name != lm.layout.layers} | layers)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "ThreadPoolExecutor", Inline)


def on_both(build_lm: Any, family: str, run: Callable[[EditableLM], Any]) -> tuple[Any, Any]:
    """What `run` gives on one device and on two."""
    whole = run(build_lm(family))
    with PretendDevices():
        lm = build_lm(family)
        _ = lm.fingerprint
        spread(lm)
        return whole, run(lm)


def moments_of(lm: EditableLM, where: Path) -> SecondMoments:
    return SecondMoments.collect(lm, TEXT, [0, 1], tokens=200, cache_dir=where)


def logits_with(lm: EditableLM, edit: Edit, *modes: str) -> list[torch.Tensor]:
    clean = held(lm.logits(PROMPT)).clone()
    found = []
    for mode in modes:
        with edit.applied(lm, mode=mode):
            found.append(held(lm.logits(PROMPT)).clone())
    assert torch.equal(held(lm.logits(PROMPT)), clean)
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "rome": {"layer": 1, "v_steps": 3},
    "r-rome": {"layer": 1, "v_steps": 3},
    "memit": {"layers": [0, 1], "v_steps": 3},
    "memit-cache": {"layers": [0, 1], "v_steps": 3, "passes": 2},
    "emmet": {"layers": [0, 1], "v_steps": 3},
    "pmet": {"layers": [0, 1], "v_steps": 3},
    "alphaedit": {"layers": [0, 1], "v_steps": 3, "nullspace_threshold": 1.0},
    "ft": {"layers": [0, 1], "ft_steps": 2},
    "ft-l": {"layers": [0, 1], "ft_steps": 2},
    "ft-c": {"layers": [0, 1], "ft_steps": 2},
    "ft-m": {"layers": [0, 1], "ft_steps": 2, "ft_batch": 2},
    "pac": {"layers": [0, 1], "top": 3, "bottom": 3, "pac_epochs": 1},
    "kn": {"kn_steps": 2, "kn_prompts": 1},
    "lora": {"layers": [0, 1], "lora_steps": 2},
    "grace": {"layer": 1, "n_iter": 3},
    "wise": {"layer": 1, "n_iter": 3},
}


@pytest.mark.parametrize("method", editors.names())
def test_an_editor(build_lm: Any, tmp_path: Path, method: str) -> None:
    editor = editors.get(method)

    def run(lm: EditableLM) -> tuple[Edit, list[torch.Tensor]]:
        options: dict[str, Any] = {"hparams": editor.hparams(lm, overrides=SETTINGS[method])}
        if "moments" in editor.takes:
            options["moments"] = moments_of(lm, tmp_path / lm.device.type)
        if "templates" in editor.takes:
            options["templates"] = TEMPLATES
        edit = editor(lm, FACTS[: 2 if editor.is_batch else 1], cache_dir=tmp_path / lm.device.type, **options)
        return edit, logits_with(lm, edit, *(["hook"] if method in ("grace", "wise") else ["hook", "merge"]))

    (_, expected), (edit, found) = on_both(build_lm, "llama", run)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
    for module in edit.modules:
        if module.delta is not None:
            assert {part.device for part in module.delta.parts().values()} == {HOMES[module.layer]}


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_an_editor_of_another_family(build_lm: Any, tmp_path: Path, family: str) -> None:
    def run(lm: EditableLM) -> list[torch.Tensor]:
        moments = moments_of(lm, tmp_path / lm.device.type)
        hparams = editors.get("memit").hparams(lm, overrides=SETTINGS["memit"])
        edit = editors.get("memit")(lm, FACTS, moments=moments, hparams=hparams, templates=TEMPLATES)
        return logits_with(lm, edit, "hook", "merge")

    for one, other in zip(*on_both(build_lm, family, run), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


def test_key_adapters(build_lm: Any, tmp_path: Path) -> None:
    text = MemoryText("players", [f"Player {n} called Kobe Bryant{n} plays basketball in Paris." for n in range(40)])
    settings = {"v_steps": 3, "steps": 3, "rank": 2, "n_subjects": 3, "n_hard": 0, "n_random": 8, "layer": 1}
    case = EditCase(3, FACTS[0], subject_rephrases=Sided(("The Republic of Slovenia",), ("Slovenija",)))

    def run(lm: EditableLM) -> tuple[Edit, list[torch.Tensor]]:
        bench = api.Workbench(lm, text=text, overrides=settings, cache_dir=tmp_path / lm.device.type)
        edit = bench.columns(["rome"], [True])["rome+rep"](case, 0)
        return edit, logits_with(lm, edit, "hook")

    (_, expected), (edit, found) = on_both(build_lm, "llama", run)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3)
    assert {part.device for part in edit.modules[0].adapters[0].weights} == {HOMES[1]}


def test_reading(build_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(lm: EditableLM) -> tuple[list[float], ...]:
        moments = moments_of(lm, tmp_path / lm.device.type)
        with monkeypatch.context() as patched:
            patched.setattr(ops, "whitened_topk", topk_on_device)  # its kernels are told the device by the keys
            collisions = scan(lm, FACTS, TEXT, moments, 1, top=3, tokens=100, block=16, rows=2)
        scores = score_nodes(lm, FACTS, score="zabs", k_node="up")
        targets = score_targets(lm, [(fact.text, fact.target_new) for fact in FACTS])
        keys = lm.keys(PROMPT, [0, 1, 2])
        homes.append([own.device for own in keys.values()])
        return (
            collisions.scores.tolist(), scores.key.flatten().tolist(), scores.value.flatten().tolist(),
            [target.nll for target in targets], [float(held(own).sum()) for own in keys.values()],
        )  # fmt: skip

    homes: list[list[torch.device]] = []
    for one, other in zip(*on_both(build_lm, "llama", run), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert homes[1] == [FIRST, SECOND, SECOND]


def test_offloaded_weights_are_refused_where_an_edit_would_not_stick(
    build_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build_lm("llama")
    lm.save_pretrained(tmp_path)
    load = loading.AutoModelForCausalLM.from_pretrained

    def offloaded(*args: Any, device_map: Any, **options: Any) -> Any:
        model, info = load(*args, **options)
        return accelerate.cpu_offload(model, execution_device="cpu"), info

    assert EditableLM.from_pretrained(tmp_path, device_map={"": "cpu"}).fingerprint == lm.fingerprint
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", offloaded)
    with pytest.raises(ModelLoadError, match=r"embed_tokens\.weight of .*offloaded, where an edit would not stick"):
        EditableLM.from_pretrained(tmp_path, device_map="auto")
    accelerate.cpu_offload(lm.model, execution_device="cpu")
    with pytest.raises(LayerError, match=r"mlp\.down_proj of layer 1 is offloaded, where an edit would not stick"):
        lm.linear_weight(1, "down")


def test_the_command_line_s_device_may_be_a_map(build_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_lm("llama").save_pretrained(tmp_path)
    asked = []
    load = loading.AutoModelForCausalLM.from_pretrained

    def noted(*args: Any, **options: Any) -> Any:
        asked.append(options.get("device_map"))
        return load(*args, **options)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", noted)
    for device in ("auto", "cpu"):
        assert api.load_model(tmp_path, device=device).device.type in ("cpu", "cuda")
    assert asked == ["auto", None]
