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
        stage(script, "bad", f"{ROW}; print('it broke'); raise SystemExit(3)"),
        stage(script, "slow", f"{ROW}; import time; time.sleep(60)", seconds=2.0),
        script.Stage("absent", ("no-such-program-here",), 5.0),
        stage(script, "good", RATED),
    ]
    said: list[str] = []
    bad, slow, absent, good = script.run_all(wanted, say=said.append)
    assert (bad.status, slow.status, good.status) == ("failed (3)", "out of time", "passed")
    assert absent.status.startswith("not there")
    assert [len(own.rows) for own in (bad, slow, absent, good)] == [1, 1, 0, 1]
    assert "it broke" in said
    assert good.rows[0] == script.Row("good", "scan", 2.0, "ms", 3.0, 0.95)


def test_nothing_starts_after_the_total(script: ModuleType) -> None:
    wanted = [stage(script, "slow", "import time; time.sleep(60)"), stage(script, "late", ROW)]
    slow, late = script.run_all(wanted, total=1.5, say=lambda _: None)
    assert (slow.status, late.status) == ("out of time", "not started")


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
    assert script.TOTAL_SECONDS < 600
    code = (SCRIPT.parent / "gpu_stages.py").read_text()
    for own in script.stages():
        if own.command[1].endswith("gpu_stages.py"):
            assert f'"{own.command[2]}"' in code


def test_without_a_gpu_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
