"""Context templates: their form, their seed, and the cache between processes."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from rep_fast.edits import Edit
from rep_fast.errors import HparamError
from rep_fast.models import EditableLM, context_templates
from rep_fast.models.context_templates import as_template


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever samples from the model fails."""

    def fail(*_: Any, **__: Any) -> str:
        raise AssertionError("sampled although the templates are in the cache")

    monkeypatch.setattr(EditableLM, "generate", fail)


@pytest.mark.parametrize(("style", "count"), [("rome", 21), ("memit", 6), ("wise", 11), ("rome-original", 21)])
def test_the_bare_prompt_comes_first_and_each_has_one_slot(
    tiny_llama: EditableLM, tmp_path: Path, style: str, count: int
) -> None:
    templates = context_templates(tiny_llama, style=style, cache_dir=tmp_path)
    assert templates[0] == "{}"
    assert len(templates) == count
    assert all(template.count("{}") == 1 and template.endswith(". {}") for template in templates[1:])


def test_braces_of_a_sampled_text_are_no_slots() -> None:
    assert as_template(" The {name} {}\n\nis ﬁne ") == "The name  is fine. {}"


def test_the_original_begins_at_the_end_of_text(build_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build_lm("llama")
    begun: list[list[int]] = []
    generate = EditableLM.generate

    def watching(self: EditableLM, prompt: Any, **settings: Any) -> str:
        begun.append([*prompt, settings["max_new_tokens"]])
        return generate(self, prompt, **settings)

    monkeypatch.setattr(EditableLM, "generate", watching)
    context_templates(lm, style="rome-original", cache_dir=tmp_path)
    end = lm.tokenizer.eos_token_id
    assert begun == [[end, 4]] * 10 + [[end, 9]] * 10
    lm.tokenizer = copy.deepcopy(lm.tokenizer)  # the fixture's own is shared
    lm.tokenizer.eos_token = None
    with pytest.raises(HparamError, match="no end-of-text token to begin with; use style 'rome'"):
        context_templates(lm, style="rome-original", cache_dir=tmp_path, seed=1)


def test_the_seed_decides_the_texts(tiny_llama: EditableLM, tmp_path: Path) -> None:
    one, same, other = (
        context_templates(tiny_llama, seed=seed, cache_dir=tmp_path / place)
        for seed, place in ((0, "a"), (0, "b"), (1, "a"))
    )
    assert one == same != other


def test_they_are_kept_where_moments_are(
    build_lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("REP_FAST_CACHE", str(tmp_path))
    drawn = context_templates(build_lm("llama"))
    (file,) = (tmp_path / "templates").iterdir()
    assert file.name.startswith("tiny-llama-rome-seed0-")
    request.getfixturevalue("no_sampling")
    assert context_templates(build_lm("llama")) == drawn  # another object with the same fingerprint


def test_model_style_and_seed_have_files_of_their_own(build_lm: Any, tmp_path: Path) -> None:
    one, other = build_lm("llama"), build_lm("llama", seed=1)
    wanted = [(one, "rome", 0), (one, "rome", 1), (one, "memit", 0), (other, "rome", 0)]
    found = {context_templates(lm, style=style, seed=seed, cache_dir=tmp_path) for lm, style, seed in wanted}
    assert len(found) == len(list((tmp_path / "templates").iterdir())) == 4


@pytest.mark.parametrize("content", ["", "[]", '{"templates": ["{}"]}', '{"digest": "0", "templates": ["{}"]}'])
def test_a_damaged_file_is_drawn_again(
    tiny_llama: EditableLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    drawn = context_templates(tiny_llama, style="memit", cache_dir=tmp_path)
    (file,) = (tmp_path / "templates").iterdir()
    file.write_text(content)
    with caplog.at_level(logging.WARNING, logger="rep_fast"):
        assert context_templates(tiny_llama, style="memit", cache_dir=tmp_path) == drawn
    assert "damaged and are drawn again" in caplog.text
    assert tuple(json.loads(file.read_text())["templates"]) == drawn


def test_a_file_that_cannot_be_read_is_not_called_damaged(
    tiny_llama: EditableLM, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = context_templates(tiny_llama, style="memit", cache_dir=tmp_path)

    def refuse(path: Path, **_: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, logger="rep_fast"):
        patched.setattr(Path, "read_text", refuse)  # the mode of a file does not stop root
        assert context_templates(tiny_llama, style="memit", cache_dir=tmp_path) == drawn
    assert "cannot be read (Permission denied) and are drawn again" in caplog.text
    assert "damaged" not in caplog.text


def test_a_place_that_cannot_be_written_is_warned_of(
    tiny_llama: EditableLM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    with caplog.at_level(logging.WARNING, logger="rep_fast"):
        templates = context_templates(tiny_llama, style="memit", cache_dir=tmp_path / "file")
    assert len(templates) == 6
    assert "are not kept" in caplog.text


def test_an_edited_model_is_refused_whatever_the_cache_holds(build_lm: Any, tmp_path: Path) -> None:
    lm = build_lm("llama")
    context_templates(lm, style="memit", cache_dir=tmp_path)
    edit = Edit((), "none", {}, lm.fingerprint, ())
    with edit.applied(lm), pytest.raises(HparamError, match="undo the active edits"):
        context_templates(lm, style="memit", cache_dir=tmp_path)


def test_an_unknown_style_is_named(tiny_llama: EditableLM) -> None:
    with pytest.raises(HparamError, match="'emmet' is unknown; choose from rome, memit"):
        context_templates(tiny_llama, style="emmet")
