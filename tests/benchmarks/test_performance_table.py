"""README's speeds are those of the committed CSV files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "performance_table.py"


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("performance_table")


def test_readme_shows_what_the_files_hold(script: ModuleType) -> None:
    readme = script.README.read_text()
    assert readme == script.with_table(readme, script.table())


def test_every_line_was_measured(script: ModuleType) -> None:
    for line in script.LINES:
        rows = script.rows_of(line.op, SCRIPT.parent / "results")
        assert line.case in {row["case"] for row in rows}, line


def rows_of_moments(*rows: str) -> str:
    head = (
        "op,case,provider,threads,median_s,share_of_ceiling,exact,cpu,versions,ceiling_fp32,ceiling_bf16,ceiling_int8"
    )
    return "\n".join([head, *(f"accumulate_moment,m4096,{row},Some CPU,torch 2,100,200,300" for row in rows)]) + "\n"


def test_a_line_takes_the_fastest_of_ours_and_of_the_peers_with_the_same_result(
    script: ModuleType, tmp_path: Path
) -> None:
    ours = ("rep_fast avx2 fp32,1,0.4,0.5,True", "rep_fast avx512 fp32,1,0.2,0.7,True")
    peers = ("torch bfloat16 matmul,1,0.3,0.4,False", "scipy ssyrk,1,1.5,,True")
    (tmp_path / "accumulate_moment.csv").write_text(rows_of_moments(*ours, *peers))
    made = script.table(tmp_path)
    assert "| 200 ms (avx512 fp32) | 1.50 s (scipy ssyrk) | 7.50 | 70 % |" in made
    assert "Some CPU, one thread; bare instructions reach float32 100, bfloat16 200, int8 300 Gop/s" in made
    assert made.endswith("torch 2.")
    assert len(made.splitlines()) == 5
    (tmp_path / "accumulate_moment.csv").write_text(rows_of_moments(*ours, peers[0]))
    assert "| 200 ms (avx512 fp32) | 300 ms (torch bfloat16 matmul, inexact) | 1.50 | 70 % |" in script.table(tmp_path)


def test_a_gpu_has_a_table_once_it_was_measured(script: ModuleType, tmp_path: Path) -> None:
    assert script.gpu_lines(tmp_path) == []
    head = "stage,case,value,unit,peer,share,gpu,torch,commit"
    rows = ("whitened_topk,400 subjects,2.0,ms,3.0,0.95", "ceilings,copy,4300.0,GB/s,,")
    for day, about in (("2026-11-20", "Old GPU,2,a"), ("2026-11-21", "New GPU,2.11,b")):
        (tmp_path / f"gpu-x-{day}.csv").write_text("\n".join([head, *(f"{row},{about}" for row in rows)]) + "\n")
    made = "\n".join(script.gpu_lines(tmp_path))
    assert "| `whitened_topk`: 400 subjects | 2 ms | 3 ms | 1.50 | 95 % |" in made
    assert "| `ceilings`: copy | 4300 GB/s | – | – | – |" in made
    assert made.endswith("New GPU, torch 2.11, commit b.")
