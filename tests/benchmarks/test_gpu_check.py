"""gpu_check.py without a GPU: limits, failures that are survived, what is written."""

from __future__ import annotations

import csv
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("gpu_check")


def stage(script: ModuleType, name: str, code: str, seconds: float = 30.0) -> object:
    return script.Stage(name, (sys.executable, "-u", "-c", code), seconds)


ROW = """print('ROW {"case": "copy", "value": 4300.0, "unit": "GB/s"}')"""
RATED = """print('ROW {"case": "scan", "value": 2.0, "unit": "ms", "peer": 3.0, "share": 0.95}')"""


def test_a_stage_that_fails_or_hangs_keeps_its_rows_and_no_other_from_running(script: ModuleType) -> None:
    wanted = [
        stage(script, "slow", f"{ROW}; import time; time.sleep(60)", seconds=2.0),
        stage(script, "bad", f"{ROW}; print('it broke'); raise SystemExit(3)"),
        script.Stage("absent", ("no-such-program-here",), 5.0),
        stage(script, "good", RATED),
    ]
    said: list[str] = []
    slow, bad, absent, good = script.run_all(wanted, total=67.0, say=said.append)
    assert (bad.status, slow.status, good.status) == ("failed (3)", "out of time", "passed")
    assert absent.status.startswith("not there")
    assert [len(own.rows) for own in (bad, slow, absent, good)] == [1, 1, 0, 1]
    assert "it broke" in said
    assert good.rows[0] == script.Row("good", "scan", 2.0, "ms", 3.0, 0.95)


def test_nothing_starts_after_the_total(script: ModuleType) -> None:
    wanted = [stage(script, "slow", "import time; time.sleep(60)"), stage(script, "late", ROW)]
    slow, late = script.run_all(wanted, total=1.5, say=lambda _: None)
    assert (slow.status, late.status) == ("out of time", "not started")


def test_what_a_stage_leaves_goes_to_the_next_and_shares_stay(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds for shares of 2, 3 and 4: the first may take 3, the second what the first left, and so on."""
    now, limits, spent = [0.0], [], iter([1.0, 5.0, 0.0])

    def run(own: object, seconds: float) -> object:
        limits.append(seconds)
        now[0] += next(spent)
        return script.Outcome("x", "passed", 0.0)

    monkeypatch.setattr(script, "run_stage", run)
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    script.run_all([stage(script, "x", "", seconds) for seconds in (2.0, 3.0, 4.0)], total=10.0, say=lambda _: None)
    assert limits == [3.0, 5.0, 4.0]


def test_programs_of_a_late_stage_are_ended_with_it(script: ModuleType) -> None:
    """A sanitizer runs its program in a process of its own, which keeps the output open."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    (outcome,) = script.run_all([stage(script, "sanitizer", code)], total=2.0, say=lambda _: None)
    assert outcome.status == "out of time"
    assert outcome.elapsed < 30


def test_outcomes_are_told_after_every_stage(script: ModuleType) -> None:
    told: list[list[str]] = []
    script.run_all(
        [stage(script, "one", ROW), stage(script, "two", "raise SystemExit(3)"), stage(script, "three", RATED)],
        say=lambda _: None,
        after=lambda found: told.append([own.stage for own in found]),
    )
    assert told == [["one"], ["one", "two"], ["one", "two", "three"]]


def test_stages_are_told_that_there_is_no_network(script: ModuleType) -> None:
    code = "import os; assert os.environ['HF_HUB_OFFLINE'] == os.environ['PIP_NO_INDEX'] == '1'"
    assert script.run_all([stage(script, "x", code)], say=lambda _: None)[0].status == "passed"


def test_lines_that_are_no_rows_are_left_out(script: ModuleType) -> None:
    lines = ['ROW {"case": "cut', "ROW [1]", 'ROW {"other": 1}', "text", ROW[7:-2]]
    assert [row.case for row in script.rows_of("x", lines)] == ["copy"]


def test_results_hold_every_number(script: ModuleType, tmp_path: Path) -> None:
    outcomes = script.run_all([stage(script, "good", f"{RATED}; {ROW}")], say=lambda _: None)
    about = {"gpu": "NVIDIA H200", "commit": "abc"}
    path = script.write_results(outcomes, about, tmp_path, datetime.date(2026, 11, 21))
    assert path.name == "gpu-nvidia-h200-2026-11-21.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["case"], row["share"], row["gpu"]) for row in rows] == [
        ("good", "scan", "0.95", "NVIDIA H200"),
        ("good", "copy", "", "NVIDIA H200"),
    ]
    assert json.loads(path.with_suffix(".json").read_text())["stages"][0]["status"] == "passed"
    shown = script.table(outcomes).splitlines()
    assert shown[-2].split() == ["good:", "scan", "2", "ms", "3", "1.50", "95", "%"]


def test_the_stages_fit_into_ten_minutes_and_have_their_code(script: ModuleType) -> None:
    assert sum(own.seconds for own in script.stages()) <= script.TOTAL_SECONDS < 600
    names = [own.name for own in script.stages()]
    assert names[0] == "build"
    assert names[-1] == "end_to_end"
    for own in script.stages():
        file, name = own.command[-2:]
        if Path(file).name in ("gpu_stages.py", "gpu_small.py"):
            assert f'"{name}": ' in Path(file).read_text()
        elif own.name.endswith("tests"):
            assert Path(name).exists()


def test_without_a_gpu_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
