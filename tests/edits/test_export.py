"""Edits that leave the package: as LoRA adapters that peft loads, and as weights of the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rep_fast.edits import Dense, Edit, KeyAdapter, LowRank, ModuleEdit, Slices
from rep_fast.errors import FingerprintError, HparamError, LayerError, OutputError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

FACT = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
TEXT = "Slovenia belongs to the continent of"
FAMILIES = ("llama", "gptj", "gpt2")


def low_rank(lm: EditableLM, layer: int, linear: str, rank: int) -> LowRank:
    outputs, inputs = lm.linear_shape(layer, linear)
    generator = torch.Generator().manual_seed(rank)
    return LowRank(
        0.2 * torch.randn(outputs, rank, generator=generator), torch.randn(rank, inputs, generator=generator)
    )


def edit_of(lm: EditableLM, *modules: ModuleEdit) -> Edit:
    return Edit((FACT,), "x", {}, lm.fingerprint, modules)


def every_linear(lm: EditableLM) -> Edit:
    """Another rank at every linear module, slices among them."""
    modules = [ModuleEdit(1, low_rank(lm, 1, name, 1 + n), linear=name) for n, name in enumerate(lm.linears)]
    outputs, inputs = lm.linear_shape(2, "down")
    rows = Slices(torch.tensor([5, 2]), torch.randn(2, inputs), "outputs", outputs)
    columns = Slices(torch.tensor([1, 7, 4]), torch.randn(lm.linear_shape(2, "up")[0], 3), "inputs", outputs)
    return edit_of(lm, *modules, ModuleEdit(2, rows), ModuleEdit(2, columns, linear="up"))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_same_logits(build_lm: Callable[..., EditableLM], family: str, tmp_path: Path) -> None:
    import peft

    lm = build_lm(family)
    clean = lm.logits([TEXT])
    edit = every_linear(lm)
    with edit.applied(lm):
        expected = lm.logits([TEXT])
    edit.export_peft(tmp_path / "adapter", lm)
    loaded = peft.PeftModel.from_pretrained(build_lm(family).model, tmp_path / "adapter").eval()
    batch = lm.encode([TEXT])
    found = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert (expected - clean).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wrapped = {
        name
        for name, module in loaded.get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert wrapped == {lm.linear_name(*module.place) for module in edit.modules}


def test_the_config_names_ranks_and_scale_one(tiny_llama: EditableLM, tmp_path: Path) -> None:
    every_linear(tiny_llama).export_peft(tmp_path, tiny_llama)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"]["model.layers.1.mlp.up_proj"] == 2
    assert config["rank_pattern"]["model.layers.2.mlp.up_proj"] == 3
    assert config["r"] == config["lora_alpha"] == max(config["rank_pattern"].values())
    assert config["base_model_name_or_path"] == tiny_llama.name
    assert not config["fan_in_fan_out"]


def adapted(lm: EditableLM, delta: LowRank | None) -> Edit:
    return edit_of(lm, ModuleEdit(1, delta, (KeyAdapter.initial(lm.key_width(1), rank=2, gate_hidden=2),)))


def test_key_adapters_are_refused_or_left_out(tiny_llama: EditableLM, tmp_path: Path) -> None:
    edit = adapted(tiny_llama, low_rank(tiny_llama, 1, "down", 2))
    with pytest.raises(HparamError, match=r"adapters at layers \[1\].*without_adapters=True"):
        edit.export_peft(tmp_path, tiny_llama)
    assert not list(tmp_path.iterdir())
    edit.export_peft(tmp_path, tiny_llama, without_adapters=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_no_adapter_can_hold(tiny_llama: EditableLM, tiny_gpt2: EditableLM, tmp_path: Path) -> None:
    shape = tiny_llama.linear_shape(1, "down")
    dense = edit_of(tiny_llama, ModuleEdit(1, Dense(torch.ones(shape))))
    with pytest.raises(LayerError, match=r"dense delta of 'down' in layer 1 has no low-rank form.*merge_into"):
        dense.export_peft(tmp_path, tiny_llama)
    empty = Slices(torch.zeros(0, dtype=torch.int64), torch.zeros(0, shape[1]), "outputs", shape[0])
    for edit in (adapted(tiny_llama, None), edit_of(tiny_llama, ModuleEdit(1, empty))):
        with pytest.raises(HparamError, match="changes no weight"):
            edit.export_peft(tmp_path, tiny_llama, without_adapters=True)
    with pytest.raises(FingerprintError):
        dense.export_peft(tmp_path, tiny_gpt2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        every_linear(tiny_llama).export_peft(tmp_path / "file", tiny_llama)


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
def test_slices_as_a_product_are_exact(axis: Any) -> None:
    values = torch.randn(2, 7) if axis == "outputs" else torch.randn(5, 2)
    slices = Slices(torch.tensor([3, 1]), values, axis, 5 if axis == "outputs" else 7)
    assert slices.to_low_rank().rank == 2
    assert torch.equal(slices.to_low_rank().to_dense(), slices.to_dense())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_edit_is_part_of_the_stored_model(
    build_lm: Callable[..., EditableLM], family: str, tmp_path: Path
) -> None:
    lm = build_lm(family)
    before = lm.fingerprint
    edit = every_linear(lm)
    with edit.applied(lm, mode="merge"):
        expected = lm.logits([TEXT])
    edit.merge_into(lm)
    assert torch.equal(lm.logits([TEXT]), expected)
    assert lm.active_edits == []
    assert lm.fingerprint != before
    with pytest.raises(FingerprintError):
        edit.apply(lm)
    lm.save_pretrained(tmp_path / "model")
    loaded = EditableLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.logits([TEXT]), expected)
    assert loaded.fingerprint == lm.fingerprint


def test_a_model_whose_edits_run_beside_its_weights_is_not_stored_without_them(
    build_lm: Callable[..., EditableLM], tmp_path: Path
) -> None:
    lm = build_lm("llama")
    edit = every_linear(lm)
    with edit.applied(lm), pytest.raises(OutputError, match=r"1 active edits run beside .* edit\.merge_into\(lm\)"):
        lm.save_pretrained(tmp_path / "hooked")
    assert not (tmp_path / "hooked").exists()
    with edit.applied(lm, mode="merge"):
        expected = lm.logits([TEXT])
        lm.save_pretrained(tmp_path / "merged")
    assert torch.equal(EditableLM.from_pretrained(tmp_path / "merged").logits([TEXT]), expected)


def test_what_cannot_be_merged(build_lm: Callable[..., EditableLM]) -> None:
    lm = build_lm("llama")
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    edit = edit_of(lm, ModuleEdit(1, low_rank(lm, 1, "down", 1)))
    with edit.applied(lm), pytest.raises(HparamError, match=r"1 edits are active .* undo them before merging"):
        edit.merge_into(lm)
    with pytest.raises(HparamError, match=r"adapters at layers \[1\].*edit\.with_adapters"):
        adapted(lm, low_rank(lm, 1, "down", 1)).merge_into(lm)
    with pytest.raises(FingerprintError):
        dataclasses.replace(edit, fingerprint="0" * 64).merge_into(lm)
    lm.linear(2, "up").weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    half_quantised = edit_of(lm, *edit.modules, ModuleEdit(2, low_rank(build_lm("llama"), 2, "up", 1), linear="up"))
    with pytest.raises(LayerError, match=r"stored as torch\.int8"):
        half_quantised.merge_into(lm)
    for name, weight in lm.model.state_dict().items():
        if "layers.2.mlp.up" not in name:
            assert torch.equal(weight, before[name]), name
