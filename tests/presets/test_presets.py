"""Presets: inheritance, families, and the translation between flat names and dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rep_fast import editors
from rep_fast.editors import RomeHparams, ValueHparams
from rep_fast.errors import HparamError
from rep_fast.evaluation import Protocol
from rep_fast.presets import Preset, flat_mapping, from_flat_mapping, load_preset, preset_names
from rep_fast.rep import RepHparams


def test_every_preset_makes_every_method() -> None:
    for name in preset_names():
        preset = load_preset(name)
        for family in ("llama", "mistral", "qwen2", "qwen3", "gptj", "gpt2"):
            for method in editors.names():
                kind = editors.get(method).hparams_type
                values = preset.section(method, family=family)
                assert isinstance(from_flat_mapping(kind, values, where=name), kind)
        for objective in ("calibrated", "paper"):
            from_flat_mapping(RepHparams, preset.section(f"rep-{objective}"), where=name)
        from_flat_mapping(Protocol, preset.section("evaluation"), where=name)


def test_default_values_are_the_papers() -> None:
    """methods §1 and §3, tables of edited layers and v* settings."""
    preset = load_preset("default")
    assert preset.section("rome", family="gpt2")["layer"] == 17
    assert preset.section("r-rome", family="gptj")["v_weight_decay"] == 0.5
    assert preset.section("r-rome", family="llama")["keys"] == "prefix"
    llama = from_flat_mapping(RomeHparams, preset.section("rome", family="llama"), where="test")
    assert llama.layer == 5
    assert llama.value == ValueHparams(25, 0.5, 1e-3, 4.0, 0.0625, 0.05)


def test_parity_preset() -> None:
    """REP-code: no early stop for ROME but one for R-ROME, standalone targets, the paper's objective (methods §16)."""
    preset = load_preset("rep-official")
    assert preset.section("rome")["early_stop"] is None
    assert preset.section("r-rome")["early_stop"] == 0.05
    assert preset.section("r-rome")["target_tok"] == "standalone"
    assert preset.section("rep")["objective"] == "paper"
    assert preset.section("rep-paper")["consistency"] == 50000


def test_like_takes_another_section_as_start() -> None:
    preset = Preset("x", {"a": {"p": 1, "q": 2, "by_family": {"gpt2": {"p": 7}}}, "b": {"like": "a", "q": 3}})
    assert preset.section("b") == {"p": 1, "q": 3}
    assert preset.section("b", family="gpt2") == {"p": 7, "q": 3}


def test_flat_names_round_trip() -> None:
    hparams = RomeHparams(layer=3, value=ValueHparams(v_steps=9))
    assert flat_mapping(hparams)["v_steps"] == 9
    assert from_flat_mapping(RomeHparams, flat_mapping(hparams), where="test") == hparams


def test_command_line_text_is_typed() -> None:
    made = from_flat_mapping(
        RomeHparams, {"layer": "2", "v_lr": "1e-2", "early_stop": "null", "mom2_adjustment": "false"}, where="--set"
    )
    assert (made.layer, made.value.v_lr, made.value.early_stop, made.mom2_adjustment) == (2, 0.01, None, False)


@dataclasses.dataclass(frozen=True)
class Several:
    layers: tuple[int, ...]


@pytest.mark.parametrize("value", [[4, 5, 6], (4, 5, 6), "4,5,6", "[4, 5, 6]", " 4, 5,6 "])
def test_layers_are_read_from_lists_and_text(value: Any) -> None:
    made = from_flat_mapping(Several, {"layers": value}, where="test")
    assert made == Several((4, 5, 6))
    assert flat_mapping(made) == {"layers": [4, 5, 6]}


@pytest.mark.parametrize(("value", "layers"), [(3, (3,)), ("3", (3,))])
def test_one_layer_is_a_list_of_one(value: Any, layers: Any) -> None:
    assert from_flat_mapping(Several, {"layers": value}, where="test") == Several(layers)


@pytest.mark.parametrize("value", ["4,x", [4.5], [True], None, "", {"a": 1}])
def test_what_is_no_list_of_layers_is_refused(value: Any) -> None:
    with pytest.raises(HparamError, match="layers must be whole numbers such as 4,5,6, got"):
        from_flat_mapping(Several, {"layers": value}, where="test")


def test_bad_values_are_named() -> None:
    with pytest.raises(HparamError, match="preset 'rep-oficial' is unknown; choose from default, "):
        load_preset("rep-oficial")
    with pytest.raises(HparamError, match=r"rome has no hyper-parameter 'v_step'; it has clamp_norm_factor"):
        from_flat_mapping(RomeHparams, {"layer": 1, "v_step": 3}, where="rome")
    with pytest.raises(HparamError, match=r"v_steps must be int, got 2\.5"):
        from_flat_mapping(RomeHparams, {"layer": 1, "v_steps": "2.5"}, where="rome")
    with pytest.raises(HparamError, match="v_lr must be float, got True"):
        from_flat_mapping(RomeHparams, {"layer": 1, "v_lr": True}, where="rome")
    with pytest.raises(HparamError, match="shuffle_join must be one of decode, raw, got 'words'"):
        from_flat_mapping(Protocol, {"shuffle_join": "words"}, where="evaluation")
    with pytest.raises(HparamError, match="needs a value for 'layer'"):
        from_flat_mapping(RomeHparams, {}, where="rome")
