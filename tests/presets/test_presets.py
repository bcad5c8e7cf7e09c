"""Presets: inheritance, families, and the translation between flat names and dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rep_fast import editors, factworld
from rep_fast.editors import RomeHparams, ValueHparams
from rep_fast.errors import HparamError
from rep_fast.evaluation import Protocol
from rep_fast.presets import Preset, _merged, flat_mapping, from_flat_mapping, load_preset, preset_names
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


@pytest.mark.parametrize("method", editors.names())
def test_every_method_has_layers_of_the_embedded_model(method: str) -> None:
    editors.get(method).hparams(factworld.load(), preset="factworld")


def test_default_values_are_the_papers() -> None:
    """methods §1 and §3, tables of edited layers and v* settings."""
    preset = load_preset("default")
    assert preset.section("rome", family="gpt2")["layer"] == 17
    assert preset.section("r-rome", family="gptj")["v_weight_decay"] == 0.5
    assert preset.section("r-rome", family="llama")["keys"] == "prefix"
    llama = from_flat_mapping(RomeHparams, preset.section("rome", family="llama"), where="test")
    assert llama.layer == 5
    assert llama.value == ValueHparams(25, 0.5, 1e-3, 4.0, 0.0625, 0.05)


def test_default_values_of_batch_methods_are_the_papers() -> None:
    """methods §1, §3 and §5: layers, v* settings and ridges by family."""
    preset = load_preset("default")
    layers = {"llama": [4, 5, 6, 7, 8], "gptj": [3, 4, 5, 6, 7, 8], "gpt2": [13, 14, 15, 16, 17]}
    for method in ("memit", "memit-cache", "pmet", "alphaedit"):
        for family, wanted in layers.items():
            assert preset.section(method, family=family)["layers"] == wanted
    for family, wanted_layers in (("qwen2", [5]), ("gptj", [5]), ("gpt2", [17])):
        assert preset.section("emmet", family=family)["layers"] == wanted_layers
    for method in ("memit", "emmet", "alphaedit"):
        for family, wanted_value in (
            ("mistral", ValueHparams(25, 0.5, 1e-3, 4.0, 0.0625, 0.05)),
            ("gptj", ValueHparams(25, 0.5, 0.5, 0.75, 0.0625, 0.05)),
            ("gpt2", ValueHparams(20, 0.5, 0.5, 0.75, 0.0625, 0.05)),
        ):
            assert hparams_of(preset, method, family).value == wanted_value
    llama = ValueHparams(20, 0.5, 0.5, 1.0, 0.0625, 0.05, stop_when_answered=True)
    assert hparams_of(preset, "pmet", "llama").value == llama
    gptj = ValueHparams(30, 0.2, 0.5, 0.75, 1.0, 0.05, stop_when_answered=True)
    assert hparams_of(preset, "pmet", "gptj").value == gptj
    assert hparams_of(preset, "memit-cache", "llama").past_keys
    assert (hparams_of(preset, "alphaedit", "llama").l2, hparams_of(preset, "alphaedit", "qwen2").l2) == (10.0, 1.0)
    assert hparams_of(preset, "alphaedit", "gptj").nullspace_threshold == 0.02


def test_presets_of_the_published_editors() -> None:
    """methods §5 and §16."""
    easy = load_preset("emmet-easyedit")
    for family, alpha in (("llama", 1e5), ("gptj", 1e5), ("gpt2", 1e4)):
        found = hparams_of(easy, "emmet", family)
        assert (found.mom2_update_weight, found.emmet_lambda) == (alpha, 0.1)
    original = load_preset("memit-original")
    weights = [hparams_of(original, "memit", family).mom2_update_weight for family in ("gptj", "gpt2")]
    assert weights == [15000, 20000]
    assert not hparams_of(original, "memit", "gptj").share_values
    assert hparams_of(load_preset("rome-original"), "rome", "gpt2").template_style == "rome-original"
    llama3 = ValueHparams(25, 0.1, 0.5, 0.75, 0.0625, 0.05)
    for preset, l2 in (("alphaedit-original", 10.0), ("llama3", 1.0)):
        found = hparams_of(load_preset(preset), "alphaedit", "llama")
        assert (found.value, found.l2) == (llama3, l2)
    assert hparams_of(load_preset("llama3"), "memit", "llama").value == llama3


def hparams_of(preset: Preset, method: str, family: str) -> Any:
    values = preset.section(method, family=family)
    return from_flat_mapping(editors.get(method).hparams_type, values, where="test")


def test_parity_preset() -> None:
    """REP-code: no early stop for ROME but one for R-ROME, standalone targets, the paper's objective (methods §16)."""
    preset = load_preset("rep-official")
    assert preset.section("rome")["early_stop"] is None
    assert preset.section("r-rome")["early_stop"] == 0.05
    assert preset.section("r-rome")["target_tok"] == "standalone"
    assert preset.section("rep")["objective"] == "paper"
    assert preset.section("rep-paper")["consistency"] == 50000


@pytest.mark.parametrize(
    "name", [name for name in preset_names() if name.endswith(("-official", "-original", "-paper", "-easyedit"))]
)
def test_presets_of_published_code_ask_edited_neighbours_as_it_does(name: str) -> None:
    assert Protocol.of_preset(load_preset(name)).edited_neighbours == "ask"


@pytest.mark.parametrize("name", ["default", "factworld", "llama3"])
def test_our_presets_leave_edited_neighbours_out(name: str) -> None:
    assert Protocol.of_preset(load_preset(name)).edited_neighbours == "drop"


def test_layers_of_the_official_code() -> None:
    """methods §1: where REP-code edits other layers than the rest of the field."""
    found, ours = load_preset("rep-official"), load_preset("default")
    for family in ("llama", "mistral"):
        assert (hparams_of(found, "grace", family).layer, hparams_of(ours, "grace", family).layer) == (31, 27)
    assert hparams_of(found, "grace", "qwen2").layer == 18
    assert hparams_of(found, "pmet", "gptj").layers == (3, 4, 5, 6, 7)
    assert hparams_of(found, "pmet", "gptj").value == hparams_of(ours, "pmet", "gptj").value


@pytest.mark.parametrize("method", ["rome", "r-rome", "memit", "memit-cache", "emmet", "alphaedit"])
def test_the_paper_s_adapters_look_for_the_whitened_direction(method: str) -> None:
    """methods §16: |·| around the similarity, no dropout, contexts of 512 tokens on both sides."""
    preset = load_preset("rep-paper")
    assert preset.section("rep")["objective"] == "paper"
    values = preset.section("rep-paper", family="llama", method=method)
    assert (values["target"], values["absolute"], values["dropout"]) == ("whitened", True, 0.0)
    assert (values["steps"], values["lr"], values["batch"], values["consistency"]) == (10, 5e-4, 15, 5e4)
    protocol = Protocol.of_preset(preset)
    assert (protocol.n_words, protocol.long_in, protocol.long_out) == (384, 5, 5)


def test_like_takes_another_section_as_start() -> None:
    preset = Preset("x", {"a": {"p": 1, "q": 2, "by_family": {"gpt2": {"p": 7}}}, "b": {"like": "a", "q": 3}})
    assert preset.section("b") == {"p": 1, "q": 3}
    assert preset.section("b", family="gpt2") == {"p": 7, "q": 3}


def test_one_method_s_values_win_over_the_family_s_and_over_what_holds_for_all() -> None:
    section = {"p": 1, "q": 2, "by_family": {"gpt2": {"p": 7, "q": 8}}, "by_method": {"memit": {"p": 9}}}
    preset = Preset("x", {"rep-paper": section})
    assert preset.section("rep-paper", family="gpt2", method="memit") == {"p": 9, "q": 8}
    assert preset.section("rep-paper", family="gpt2", method="rome") == {"p": 7, "q": 8}
    assert preset.section("rep-paper") == {"p": 1, "q": 2}


@pytest.mark.parametrize(
    ("method", "target"),
    [("rome", "whitened"), ("r-rome", "whitened"), ("memit", "raw"), ("memit-cache", "raw"), ("emmet", "raw")],
)
def test_the_official_adapters_of_batch_methods_look_for_the_raw_key(method: str, target: str) -> None:
    section = load_preset("rep-official").section("rep-paper", family="llama", method=method)
    assert section.get("target", "whitened") == target
    assert "target" not in load_preset("default").section("rep-paper", family="llama", method=method)


def test_an_extending_preset_keeps_and_overrides_what_was_said_for_methods() -> None:
    base = {"p": 1, "by_method": {"memit": {"p": 9, "q": 2}}}
    assert _merged(base, {"by_method": {"memit": {"q": 3}}})["by_method"] == {"memit": {"p": 9, "q": 3}}
    assert _merged(base, {"p": 4}) == {"p": 4, "by_method": {"memit": {"q": 2}}}


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
    with pytest.raises(HparamError, match="preset 'rep-oficial' is unknown; choose from alphaedit-original, default, "):
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
