from __future__ import annotations

import json
import math

import pytest

from rep_fast.errors import CorruptFileError, OutputError, RunMismatchError
from rep_fast.evaluation import CaseRecord, PromptScore, RunDirectory

SETTINGS = {"model": "tiny", "seeds": (0, 1), "hparams": {"rome": {"v_steps": 20}}}


def record(case_id: int, column: str = "rome", nll: float = 0.25) -> CaseRecord:
    kept = PromptScore((True, False), 1.5, agreement=0.5)
    scores = {"success": {"new": (PromptScore((True,), nll),)}, "locality": {"kept": (kept, kept)}}
    return CaseRecord(0, case_id, column, scores, {"edit": 0.5})


def test_records_come_back_as_they_were(tmp_path):
    records = [record(0), record(1, nll=math.inf), CaseRecord(1, 0, "memit", failure="no such token")]
    with RunDirectory(tmp_path / "run", SETTINGS) as run:
        for item in records:
            run.append(item)
    with RunDirectory(tmp_path / "run", SETTINGS, resume=True) as run:
        assert list(run.records.values()) == records


def test_every_record_is_on_disk_before_the_next(tmp_path):
    run = RunDirectory(tmp_path / "run", SETTINGS)
    for case_id in range(3):
        run.append(record(case_id))
        assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == case_id + 1
    run.close()


def test_a_kill_at_any_byte_loses_only_the_unfinished_record(tmp_path):
    with RunDirectory(tmp_path / "run", SETTINGS) as run:
        run.append(record(0))
        run.append(record(1))
    results = tmp_path / "run" / "results.jsonl"
    content = results.read_bytes()
    first = content.index(b"\n") + 1
    for cut in (first, first + 1, first + 30, len(content) - 2, len(content) - 1):
        results.write_bytes(content[:cut])
        with RunDirectory(tmp_path / "run", SETTINGS, resume=True) as run:
            assert [r.case_id for r in run.records.values()] == [0]
            run.append(record(1))
        assert results.read_bytes() == content


def test_existing_directory_is_not_overwritten(tmp_path):
    RunDirectory(tmp_path / "run", SETTINGS).close()
    with pytest.raises(OutputError, match="not empty"):
        RunDirectory(tmp_path / "run", SETTINGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        RunDirectory(tmp_path / "other", SETTINGS)


def test_resuming_what_was_never_started_starts_it(tmp_path):
    assert not RunDirectory.check_place(tmp_path / "run", resume=True)
    with RunDirectory(tmp_path / "run", SETTINGS, resume=True) as run:
        assert run.records == {}
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["model"] == "tiny"
    assert RunDirectory.check_place(tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no run"):
        RunDirectory(tmp_path / "other", SETTINGS, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_killed_while_it_wrote_its_settings_begins_again(tmp_path, monkeypatch, resume):
    class KilledError(BaseException):
        pass

    def kill(*_):
        raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", kill)
        patched.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(KilledError):
            RunDirectory(tmp_path / "run", SETTINGS)
    (left,) = (tmp_path / "run").iterdir()
    assert left.name.startswith(".settings.json.")
    assert not RunDirectory.check_place(tmp_path / "run", resume=resume)
    with RunDirectory(tmp_path / "run", SETTINGS, resume=resume) as run:
        run.append(record(0))
    with RunDirectory(tmp_path / "run", SETTINGS, resume=True) as run:
        assert len(run.records) == 1


def test_dropped_setting_is_refused_by_name(tmp_path):
    RunDirectory(tmp_path / "run", {**SETTINGS, "text": "wikitext"}).close()
    with pytest.raises(RunMismatchError, match=" text="):
        RunDirectory(tmp_path / "run", SETTINGS, resume=True)


def test_unwritable_place_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="file"):
            RunDirectory(place, SETTINGS)


def test_damage_before_the_last_line_is_corrupt(tmp_path):
    with RunDirectory(tmp_path / "run", SETTINGS) as run:
        run.append(record(0))
        run.append(record(1))
    results = tmp_path / "run" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("{}\n" + lines[1])
    with pytest.raises(CorruptFileError, match="line 1"):
        RunDirectory(tmp_path / "run", SETTINGS, resume=True)
    results.write_text(lines[0] + lines[0])
    with pytest.raises(CorruptFileError, match="repeats"):
        RunDirectory(tmp_path / "run", SETTINGS, resume=True)


def test_damaged_settings_are_corrupt(tmp_path):
    RunDirectory(tmp_path / "run", SETTINGS).close()
    for content, named in (("{", "not JSON"), ("[]", "not a settings file")):
        (tmp_path / "run" / "settings.json").write_text(content)
        with pytest.raises(CorruptFileError, match=named):
            RunDirectory(tmp_path / "run", SETTINGS, resume=True)
    (tmp_path / "run" / "settings.json").unlink()
    with pytest.raises(CorruptFileError, match=r"no settings\.json"):
        RunDirectory(tmp_path / "run", SETTINGS, resume=True)


def test_two_processes_cannot_share_a_run(tmp_path):
    first = RunDirectory(tmp_path / "run", SETTINGS)
    with pytest.raises(OutputError, match="in use"):
        RunDirectory(tmp_path / "run", SETTINGS, resume=True)
    first.close()
    RunDirectory(tmp_path / "run", SETTINGS, resume=True).close()


def test_a_record_is_written_once():
    run = RunDirectory(None, SETTINGS)
    run.append(record(0))
    with pytest.raises(RunMismatchError, match="already written"):
        run.append(record(0))


def test_run_in_memory_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunDirectory(None, SETTINGS) as run:
        run.append(record(0))
        run.write_json("pre_edit.json", {})
        assert run.read_json("pre_edit.json") is None
    assert list(tmp_path.iterdir()) == []
