"""A run on disk: settings, pre-edit predictions and append-only results that survive being killed.

`settings.json` says what the run is, `pre_edit.json` what the unedited model predicts, `results.jsonl` holds one record
per line, each flushed to the disk before the next one is computed. A last line cut short by a kill is dropped. `edits/`
holds the edits of the group that is being written (regime.py), one file each.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rep_fast.errors import CorruptFileError, OutputError, RunMismatchError
from rep_fast.evaluation.records import CaseRecord, RecordKey
from rep_fast.safe_files import is_left_over, write_atomically

FORMAT = 2


class RunDirectory:
    """Records of one run by (seed, case_id, column, n_edits), kept in memory and, when there is a path, on disk.

    Args:
        path: directory to create or resume, see `check_place`; None keeps the run in memory only.
        settings: what identifies the run, JSON data; a resumed run must have the same.
        resume: continue the run that stands there.
        absent: part of the settings → its fields that older runs did not write down, with the value they ran with.
    Raises:
        OutputError: the directory holds something that is not to be resumed, cannot be written, or another process
            uses it.
        RunMismatchError: the run there was started with other settings; the message names the first field that differs.
        CorruptFileError: a stored file is not what this class writes.
    """

    def __init__(
        self,
        path: str | Path | None,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        absent: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._absent = absent or {}
        self.path = None if path is None else Path(path)
        self.records: dict[RecordKey, CaseRecord] = {}
        self._results: IO[bytes] | None = None
        if self.path is None:
            return
        # Through JSON and back, so that tuples compare equal to the lists a file gives.
        wanted = json.loads(json.dumps({"format": FORMAT, **settings}, default=str))
        try:
            self._open(self.path, wanted, resume)
        except (OutputError, CorruptFileError):
            self.close()
            raise
        except OSError as error:
            self.close()
            raise OutputError(
                f"cannot write the run directory {str(self.path)!r} ({error.strerror or error}); choose another --out"
            ) from error
        except RunMismatchError:
            self.close()
            raise

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the results file; records stay readable."""
        if self._results is not None:
            self._results.close()
            self._results = None

    def append(self, record: CaseRecord) -> None:
        """Keep one record; on disk it is complete before this returns."""
        if record.key in self.records:
            raise RunMismatchError(f"record {record.key} was already written; cases need distinct case_id")
        if self._results is not None:
            line = json.dumps(record.to_json(), allow_nan=False, separators=(",", ":")) + "\n"
            try:
                self._results.write(line.encode())
                self._results.flush()
                os.fsync(self._results.fileno())
            except OSError as error:
                raise OutputError(
                    f"cannot append to {self._results.name!r} ({error.strerror or error}); free space, then resume"
                ) from error
        self.records[record.key] = record

    def directory(self, *parts: str) -> Path | None:
        """Place of further files of this run, None for a run in memory; nothing is made there."""
        return None if self.path is None else self.path.joinpath(*parts)

    def read_json(self, name: str) -> Any | None:
        """Contents of a JSON file of this run, None when there is none.

        Raises:
            CorruptFileError: it is not JSON.
        """
        if self.path is None or not (self.path / name).exists():
            return None
        return _read_json(self.path / name)

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of this run, atomically; nothing for a run in memory."""
        self.write_text(name, json.dumps(data, indent=1, default=str) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of this run, atomically; nothing for a run in memory.

        Raises:
            OutputError: the directory cannot be written.
        """
        if self.path is None:
            return
        write_atomically(self.path / name, text.encode())

    @staticmethod
    def check_place(path: str | Path, *, resume: bool) -> bool:
        """Whether a run stands there to go on with; `resume` where there is none yet begins it.

        A job that may be killed at any moment, before its first record too, is then started and resumed by one command.

        Raises:
            OutputError: the directory holds something else, or a run and `resume` is false.
            CorruptFileError: it has results that nobody knows the settings of.
        """
        path = Path(path)
        if (path / "settings.json").exists() and resume:
            return True
        if resume and (path / "results.jsonl").exists():
            raise CorruptFileError(f"{str(path)!r} has results but no settings.json; choose another --out")
        # killed while settings.json was being written, a run leaves no more than a temporary file
        if path.is_dir() and not all(is_left_over(file) for file in path.iterdir()):
            remedy = "it holds no run: choose" if resume else "resume the run there (--resume) or choose"
            raise OutputError(f"{str(path)!r} is not empty; {remedy} another --out")
        return False

    def _open(self, path: Path, settings: dict[str, Any], resume: bool) -> None:
        if self.check_place(path, resume=resume):
            known = _completed(path, self.read_json("settings.json"), self._absent)
            _check_settings(path, known, settings)
        else:
            path.mkdir(parents=True, exist_ok=True)
            self.write_json("settings.json", settings)
        self._results = (path / "results.jsonl").open("ab+")
        self._lock()
        self._read_results()

    def _lock(self) -> None:
        assert self._results is not None
        try:
            fcntl.flock(self._results, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{str(self.path)!r} is in use by another process; wait for it to end") from error

    def _read_results(self) -> None:
        assert self._results is not None
        self._results.seek(0)
        content = self._results.read()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            self._results.truncate(len(complete))
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = CaseRecord.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CorruptFileError(
                    f"line {number} of {self._results.name!r} is not a result record; restore it or start a new run"
                ) from error
            if record.key in self.records:
                raise CorruptFileError(f"line {number} of {self._results.name!r} repeats the record {record.key}")
            self.records[record.key] = record


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{str(path)!r} is not JSON; restore it or start a new run elsewhere") from error


def _completed(path: Path, known: Any, absent: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Stored settings with what was not written down when they were stored."""
    if not isinstance(known, dict):
        raise CorruptFileError(f"{str(path / 'settings.json')!r} is not a settings file; start a new run elsewhere")
    return known | {
        part: {**fields, **known[part]} for part, fields in absent.items() if isinstance(known.get(part), dict)
    }


def _check_settings(path: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in [*wanted, *(name for name in known if name not in wanted)]:
        if known.get(name) != wanted.get(name):
            raise RunMismatchError(
                f"the run in {str(path)!r} has {name}={_short(known.get(name))}, this one has "
                f"{name}={_short(wanted.get(name))}; resume with the same settings or choose another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"
