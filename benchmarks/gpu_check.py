"""Everything there is to learn from a GPU, in one go of under ten minutes.

    python benchmarks/gpu_check.py [--only STAGE …]

builds the package, runs the ops' tests on the GPU and small shapes under compute-sanitizer, measures the device's
ceilings, every kernel beside torch, and edits, scans and moments on a random model of 7B's shape. Every stage has a
share of the time that no other can take from it, and one that fails keeps no other from running. What was measured
until then goes to results/gpu-<name>-<date>.csv and .json after each stage; the table is printed last. Nothing here
reaches for the network.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROW_MARK = "ROW "  # a line of a stage's output that holds a row, as JSON
TOTAL_SECONDS = 570.0
_STAGES_FILE, _SMALL_FILE = str(HERE / "gpu_stages.py"), str(HERE / "gpu_small.py")
_SANITIZERS = ("memcheck", "racecheck", "synccheck")
# no stage waits for a network that is not there
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
_OP_TESTS = HERE.parent / "tests" / "ops"
# whose blocks or warps wait for each other, each apart: who waits wrongly would wait for ever
_TESTS_APART = {
    "gate_tests": (_OP_TESTS / "test_gated_adapter_gpu.py", 20.0),
    "fused_tests": (_OP_TESTS / "test_scan_fused.py", 15.0),
    "wgmma_tests": (_OP_TESTS / "test_moment_wgmma.py", 10.0),
}
_PYTEST = ("-m", "pytest", "-n0", "-q", "-o", "addopts=--strict-markers", "-k", "cuda and not cpu")


@dataclass(frozen=True)
class Row:
    """`value` in `unit`; `peer`, the same of torch, and `share` of the measured ceiling, where they exist."""

    stage: str
    case: str
    value: float
    unit: str
    peer: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Stage:
    """A command with its share of the time in seconds; what earlier stages left of theirs comes on top."""

    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "passed", "failed (status)", "out of time", "not started" or "not there"."""

    stage: str
    status: str
    elapsed: float
    rows: tuple[Row, ...] = ()
    tail: str = ""


def stages() -> list[Stage]:
    """All stages, the ones that must not be missed first."""
    python = sys.executable
    measured = (
        ("ceilings", 15.0),
        ("whitened_topk", 45.0),
        ("gated_adapter", 20.0),
        ("accumulate_moment", 15.0),
        ("packed_scores", 15.0),
        ("spd_solver", 20.0),
        ("fused_scan", 25.0),
        ("wgmma_moment", 15.0),
    )
    sanitize = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    sanitized = [
        Stage(f"{prefix}{tool}", (*sanitize, tool, python, _SMALL_FILE, f"{prefix}small"), 25.0)
        for prefix, tool in (*(("", own) for own in _SANITIZERS), ("fused_", "memcheck"), ("wgmma_", "memcheck"))
    ]
    return [
        Stage(
            "build", (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(HERE.parent)), 110
        ),
        Stage(
            "tests",
            (python, *_PYTEST, *(f"--ignore={path}" for path, _ in _TESTS_APART.values()), str(_OP_TESTS)),
            45.0,
        ),
        *(Stage(name, (python, *_PYTEST, str(path)), seconds) for name, (path, seconds) in _TESTS_APART.items()),
        *(Stage(name, (python, _STAGES_FILE, name), seconds) for name, seconds in measured),
        *sanitized,
        Stage("end_to_end", (python, _STAGES_FILE, "end_to_end"), 75.0),
    ]


def run_stage(stage: Stage, seconds: float) -> Outcome:
    """Run a stage for at most `seconds`; its rows up to then are kept, whatever becomes of it."""
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            stage.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | _OFFLINE,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return Outcome(stage.name, f"not there ({error})", 0.0)
    is_late = threading.Event()

    def stop() -> None:
        is_late.set()
        os.killpg(process.pid, signal.SIGKILL)  # a sanitizer's program, too: it would keep the output open

    timer = threading.Timer(seconds, stop)
    timer.start()
    assert process.stdout is not None
    lines = [line.rstrip("\n") for line in process.stdout]
    status = process.wait()
    timer.cancel()
    ended = "out of time" if is_late.is_set() else "passed" if status == 0 else f"failed ({status})"
    tail = "\n".join([line for line in lines if not line.startswith(ROW_MARK)][-15:])
    return Outcome(stage.name, ended, time.monotonic() - start, rows_of(stage.name, lines), tail)


def rows_of(stage: str, lines: Iterable[str]) -> tuple[Row, ...]:
    """The rows among a stage's lines; a line cut off by the end of its time is no row."""
    found = []
    for line in lines:
        if line.startswith(ROW_MARK):
            try:
                found.append(Row(stage=stage, **json.loads(line.removeprefix(ROW_MARK))))
            except (json.JSONDecodeError, TypeError):
                continue
    return tuple(found)


def run_all(
    wanted: Sequence[Stage],
    *,
    total: float = TOTAL_SECONDS,
    say: Callable[[str], None] = print,
    after: Callable[[list[Outcome]], object] = lambda _: None,
) -> list[Outcome]:
    """Stages in turn; each may take what is left of `total` seconds but the shares of those behind it.

    after: called with all outcomes so far when a stage has ended, so that a run that is killed leaves them.
    """
    end = time.monotonic() + total
    outcomes: list[Outcome] = []
    for number, stage in enumerate(wanted):
        left = end - time.monotonic()
        limit = min(left, max(stage.seconds, left - sum(own.seconds for own in wanted[number + 1 :])))
        if limit < 1:
            outcomes.append(Outcome(stage.name, "not started", 0.0))
            continue
        outcome = run_stage(stage, limit)
        outcomes.append(outcome)
        after(outcomes)
        say(f"{outcome.stage}: {outcome.status} after {outcome.elapsed:.0f} s")
        if outcome.status != "passed":
            say(outcome.tail)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """The short table: how each stage ended, then every number."""
    lines = [f"{'stage':<16} {'ended':<16} {'s':>6}"]
    lines += [f"{own.stage:<16} {own.status[:16]:<16} {own.elapsed:>6.0f}" for own in outcomes]
    lines.append(f"\n{'case':<52} {'value':>10} {'unit':<8} {'torch':>10} {'ratio':>6} {'share':>6}")
    for row in (row for own in outcomes for row in own.rows):
        peer = "" if row.peer is None else f"{row.peer:.4g}"
        ratio = "" if row.peer is None or not row.value else f"{row.peer / row.value:.2f}"
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        case = f"{row.stage}: {row.case}"
        lines.append(f"{case:<52} {row.value:>10.4g} {row.unit:<8} {peer:>10} {ratio:>6} {share:>6}")
    return "\n".join(lines)


def write_results(outcomes: Sequence[Outcome], about: dict[str, str], directory: Path, day: datetime.date) -> Path:
    """gpu-<name>-<date>.csv with the rows and .json with everything; the CSV's path."""
    name = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    path = directory / f"gpu-{name}-{day.isoformat()}.csv"
    directory.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(Row)), *about])
        writer.writeheader()
        writer.writerows(asdict(row) | about for own in outcomes for row in own.rows)
    everything = {"about": about, "stages": [asdict(own) for own in outcomes]}
    path.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    return path


def about_this_gpu() -> dict[str, str] | None:
    """What the numbers are measured on; None without a device."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "commit": commit.stdout.strip(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0: everything passed; 1: something did not; 2: there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages()]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    wanted = parser.parse_args(arguments).only
    about = about_this_gpu()
    if about is None:
        print("gpu_check.py: torch finds no CUDA device; run it where there is one", file=sys.stderr)
        return 2
    day = datetime.datetime.now(tz=datetime.timezone.utc).date()
    chosen = [stage for stage in stages() if stage.name in wanted]
    outcomes = run_all(chosen, after=lambda found: write_results(found, about, RESULTS, day))
    path = write_results(outcomes, about, RESULTS, day)
    print(f"\n{about['gpu']}, torch {about['torch']}, commit {about['commit']}; {path}\n\n{table(outcomes)}")
    return 0 if all(own.status == "passed" for own in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
