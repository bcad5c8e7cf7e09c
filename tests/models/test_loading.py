from __future__ import annotations

import json
import shutil

import pytest
import torch

from rep_fast.errors import HparamError, MissingDependencyError, ModelLoadError, NonFiniteError, UnknownFamilyError
from rep_fast.models import FAMILIES, EditableLM, loading


@pytest.fixture(scope="session")
def saved(build_lm, tmp_path_factory):
    """Directories of a llama and a gpt2."""
    root = tmp_path_factory.mktemp("saved")
    for family in ("llama", "gpt2"):
        build_lm(family).save_pretrained(root / family)
    return root


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the llama that the test may break."""
    return shutil.copytree(saved / "llama", tmp_path / "model")


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_keeps_bits_and_fingerprint(family, build_lm, tmp_path):
    lm = build_lm(family)
    lm.save_pretrained(tmp_path / "one")
    first = EditableLM.from_pretrained(tmp_path / "one", device="cpu")
    first.save_pretrained(tmp_path / "two")
    again = EditableLM.from_pretrained(str(tmp_path / "two"), device="cpu")
    assert again.fingerprint == first.fingerprint
    if family != "qwen2":  # transformers opens every Qwen2 directory with its own tokenizer class
        assert first.fingerprint == lm.fingerprint
    assert torch.equal(again.logits(["Slovenia is in"]), lm.logits(["Slovenia is in"]))
    assert not any(weight.requires_grad for weight in again.model.parameters())
    assert not again.model.training
    assert again.family == family
    assert again.name.endswith("two")


def test_nothing_is_printed(saved, tmp_path, capfd):
    EditableLM.from_pretrained(saved / "llama", device="cpu").save_pretrained(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos", "metaspace_always", "metaspace_first"])
def test_round_trip_of_tokenizers(build_lm, tmp_path, kind):
    lm = build_lm("llama", tokenizer=kind)
    lm.save_pretrained(tmp_path)
    again = EditableLM.from_pretrained(tmp_path, device="cpu")
    assert again.fingerprint == lm.fingerprint
    assert again.locate("In {} is", "Slovenia") == lm.locate("In {} is", "Slovenia")


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, "float32"), ("bfloat16", "bfloat16"), (torch.float64, "float64")]
)
def test_dtype_is_kept_or_asked_for(saved, dtype, expected):
    lm = EditableLM.from_pretrained(saved / "llama", dtype=dtype, device="cpu")
    assert lm.dtype == getattr(torch, expected)


def test_unknown_dtype_is_named(saved):
    for dtype in ("int8", "float12", "nn"):
        with pytest.raises(HparamError, match=dtype):
            EditableLM.from_pretrained(saved / "llama", dtype=dtype)


def test_layout_of_a_user_is_taken(saved):
    lm = EditableLM.from_pretrained(saved / "llama", layout=FAMILIES["qwen2"], device="cpu")
    assert lm.family == "qwen2"


def test_the_embedded_model_is_resolved_or_explained(monkeypatch, saved, tmp_path):
    monkeypatch.setattr(loading, "files", lambda _: tmp_path)
    with pytest.raises(ModelLoadError, match="rep-fast factworld train"):
        EditableLM.from_pretrained("factworld")
    shutil.copytree(saved / "llama", tmp_path / "factworld" / "weights" / "llama")
    lm = EditableLM.from_pretrained("factworld", device="cpu")
    assert (lm.name, lm.family, lm.dtype) == ("factworld", "llama", torch.float32)


def test_unknown_family_is_found_before_weights_are_read(damaged):
    (damaged / "model.safetensors").unlink()
    change_config(damaged, model_type="bert")
    with pytest.raises(UnknownFamilyError, match="'bert'"):
        EditableLM.from_pretrained(damaged)


def break_file(name, content):
    def damage(directory):
        (directory / name).write_bytes(content)

    return damage


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def only_pickle(directory):
    path = directory / "model.safetensors"
    torch.save({}, directory / "pytorch_model.bin")
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "weights .* safetensors"),
        (break_file("model.safetensors", b""), "weights"),
        (break_file("model.safetensors", b"x" * 64), "weights"),
        (lambda d: (d / "model.safetensors").unlink(), "weights"),
        (only_pickle, "weights .* safetensors"),
        (lambda d: change_config(d, num_hidden_layers=4), r"9 tensors missing, .* model\.layers\.3"),
        (lambda d: change_config(d, intermediate_size=52), "9 of another shape"),
        (break_file("config.json", b"{"), r"config\.json"),
        (break_file("config.json", b"[]"), r"config\.json"),
        (lambda d: (d / "config.json").unlink(), r"config\.json"),
        (lambda d: change_config(d, model_type="nonsense"), r"config\.json"),
        (break_file("tokenizer.json", b"{"), "tokenizer"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
        (shutil.rmtree, "no directory"),
    ],
)
def test_damage_is_one_sentence(damaged, damage, message):
    damage(damaged)
    with pytest.raises(ModelLoadError, match=message) as caught:
        EditableLM.from_pretrained(damaged)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


def test_tokenizer_without_vocabulary_is_refused(saved, tmp_path):
    """transformers opens a GPT-2 directory without tokenizer files as an empty tokenizer."""
    directory = shutil.copytree(saved / "gpt2", tmp_path / "model")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelLoadError, match="tokenizer"):
        EditableLM.from_pretrained(directory)


def test_a_file_is_not_a_directory(saved):
    with pytest.raises(ModelLoadError, match="is a file"):
        EditableLM.from_pretrained(saved / "llama" / "config.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(build_lm, tmp_path, value):
    lm = build_lm("llama")
    lm.down_weight(1).data[3, 4] = value
    lm.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight holds 1 "):
        EditableLM.from_pretrained(tmp_path)


def test_large_finite_weights_pass(build_lm):
    """The sum of a tensor may overflow although every element is finite."""
    lm = build_lm("llama")
    lm.down_weight(0).data.fill_(3e38)
    loading.check_finite(lm.model)


def test_device_map_without_accelerate_names_the_package(saved, monkeypatch):
    def no_accelerate(*_, **__):
        raise ValueError("Using a `device_map` requires `accelerate`.\nInstall it.")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", no_accelerate)
    with pytest.raises(MissingDependencyError, match="pip install accelerate"):
        EditableLM.from_pretrained(saved / "llama", device_map="auto")
