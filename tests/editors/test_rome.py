"""ROME and R-ROME on tiny random models: constraint, rank, provenance, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rep_fast import editors
from rep_fast.editors import RomeHparams, ValueHparams
from rep_fast.errors import FingerprintError, HparamError, LayerError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
TEMPLATES = ("{}", "I think that. {}", "Because of this, they went. {}")
HPARAMS = RomeHparams(layer=1, value=ValueHparams(v_steps=4, early_stop=None))


def random_moments(lm: EditableLM, layer: int = 1) -> SecondMoments:
    width = lm.key_width(layer)
    keys = torch.randn(6 * width, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return SecondMoments.from_matrices(
        {layer: keys.T @ keys / len(keys)}, {layer: len(keys)}, corpus="random", fingerprint=lm.fingerprint
    )


@pytest.mark.parametrize("method", ["rome", "r-rome"])
def test_the_edited_module_gives_v_star(tiny_lm64: EditableLM, method: str) -> None:
    hparams = dataclasses.replace(HPARAMS, keys="rome" if method == "rome" else "prefix")
    edit = editors.get(method)(
        tiny_lm64, [FACT], moments=random_moments(tiny_lm64), hparams=hparams, templates=TEMPLATES
    )
    delta = edit.modules[0].delta
    assert delta is not None
    assert delta.rank == 1
    weight = tiny_lm64.down_weight(1) + delta.to_dense()
    bias = tiny_lm64.down_bias(1)
    out = weight @ edit.modules[0].vectors["k_star"] + (0 if bias is None else bias)
    torch.testing.assert_close(out, edit.tensors["v_star"], rtol=1e-9, atol=1e-9)
    # ρ(k*) = 1: the response is normalised by the editor's own denominator
    assert float(edit.modules[0].vectors["k_star"] @ edit.modules[0].vectors["response"]) == pytest.approx(1, rel=1e-9)


def test_only_the_edited_key_direction_moves(tiny_llama64: EditableLM) -> None:
    edit = editors.get("rome")(
        tiny_llama64, [FACT], moments=random_moments(tiny_llama64), hparams=HPARAMS, templates=TEMPLATES
    )
    delta = edit.modules[0].delta
    assert delta is not None
    direction = edit.modules[0].vectors["direction"]
    probe = torch.randn(tiny_llama64.key_width(1), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    untouched = probe - direction * (probe @ direction) / (direction @ direction)
    assert float((delta.to_dense() @ untouched).norm()) <= 1e-12 * float(delta.to_dense().norm() * probe.norm())


def test_without_second_moment_the_direction_is_the_key(tiny_llama64: EditableLM) -> None:
    hparams = dataclasses.replace(HPARAMS, mom2_adjustment=False, keys="prompt")
    edit = editors.get("rome")(tiny_llama64, [FACT], moments=None, hparams=hparams, templates=TEMPLATES)
    torch.testing.assert_close(edit.modules[0].vectors["direction"], edit.modules[0].vectors["k_star"])


def test_the_edit_survives_a_round_trip_and_undo(build_lm: Any, tmp_path: Any) -> None:
    lm = build_lm("gpt2")
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    edit = editors.get("r-rome")(lm, [FACT], moments=random_moments(lm), hparams=HPARAMS, templates=TEMPLATES)
    edit.save(tmp_path / "edit.safetensors")
    loaded = type(edit).load(tmp_path / "edit.safetensors", lm)
    assert loaded.hparams["v_steps"] == 4
    with loaded.applied(lm, mode="merge"):
        assert not torch.equal(lm.down_weight(1), before["transformer.h.1.mlp.c_proj.weight"].T)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())


def test_a_vanishing_denominator_is_warned_of(tiny_llama64: EditableLM) -> None:
    """With k_0 orthogonal to u the update explodes: the disabling edit."""
    lm, moments = tiny_llama64, random_moments(tiny_llama64)
    edit = editors.get("rome")(lm, [FACT], moments=moments, hparams=HPARAMS, templates=TEMPLATES)
    k_0 = edit.modules[0].vectors["k_star"]
    found = editors.optimise_value(lm, FACT, layer=1, templates=TEMPLATES, hparams=HPARAMS.value)
    k_mean = found.keys.mean(dim=0)
    # a second moment under which the whitened average is all but orthogonal to the bare key
    across = k_mean - k_0 * (k_0 @ k_mean) / (k_0 @ k_0)
    eye = torch.eye(len(k_0), dtype=torch.float64)
    unit = across / across.norm()
    matrix = 1e5 * (eye - torch.outer(unit, unit)) + torch.outer(unit, unit)
    skewed = SecondMoments.from_matrices({1: matrix}, {1: 999}, corpus="made up", fingerprint=lm.fingerprint)
    with pytest.warns(UserWarning, match="may disable the model"):
        editors.get("rome")(lm, [FACT], moments=skewed, hparams=HPARAMS, templates=TEMPLATES)


def test_layer_and_layers_stand_for_each_other(tiny_llama: EditableLM) -> None:
    rome = editors.get("rome")
    for given in ({"layer": 1}, {"layers": 1}, {"layers": (1,)}, {"layers": "1"}):
        assert rome.hparams(tiny_llama, overrides=given).layers == (1,)
    with pytest.raises(HparamError, match=r"rome edits one layer, got \[0, 1\]"):
        rome.hparams(tiny_llama, overrides={"layers": (0, 1)})


def test_refusals(tiny_llama: EditableLM, tiny_gpt2: EditableLM) -> None:
    rome = editors.get("rome")
    with pytest.raises(HparamError, match="one fact at a time, got 2"):
        rome(tiny_llama, [FACT, FACT], moments=random_moments(tiny_llama), hparams=HPARAMS, templates=TEMPLATES)
    with pytest.raises(FingerprintError):
        rome(tiny_llama, [FACT], moments=random_moments(tiny_gpt2), hparams=HPARAMS, templates=TEMPLATES)
    with pytest.raises(HparamError, match="hold layers 0, not 1"):
        rome(tiny_llama, [FACT], moments=random_moments(tiny_llama, 0), hparams=HPARAMS, templates=TEMPLATES)
    with pytest.raises(HparamError, match="needs second moments"):
        rome(tiny_llama, [FACT], moments=None, hparams=HPARAMS, templates=TEMPLATES)
    with pytest.raises(LayerError):
        rome.hparams(tiny_llama, overrides={"layer": 99})
    with pytest.raises(HparamError, match="method 'rom' is unknown; choose from rome, r-rome"):
        editors.get("rom")
    with pytest.raises(HparamError, match="keys='mean' is unknown"):
        RomeHparams(layer=0, keys="mean")
