"""Rows of a benchmark: ratios, shares and memory are what they say; no time is tested."""

from __future__ import annotations

import csv
import math
import mmap
import os

import pytest
import torch

from rep_fast import bench
from rep_fast.bench import OPS, Ceilings, Provider, ScanCase, interleaved, measure, write_csv
from rep_fast.errors import BackendError
from rep_fast.ops import native

TINY = ScanCase("tiny", 300, 7, 40, k=4)


@pytest.fixture
def clock(monkeypatch):
    """Every run takes the seconds its provider names, so that the arithmetic can be checked."""
    taken = {}

    def seconds(run):
        run()
        return next(taken[run])

    monkeypatch.setattr(interleaved, "_seconds", seconds)
    monkeypatch.setattr(interleaved, "product_ceiling", lambda dtype, threads: {"fp32": 100.0, "bf16": 0.0}[dtype])
    return taken


def test_ratios_are_medians_of_rounds_and_shares_of_the_ceiling(clock):
    def ours():
        return "ours"

    def fast():
        return "fast"

    def slow():
        return "slow"

    clock[ours], clock[fast], clock[slow] = iter([1.0, 2.0, 4.0]), iter([2.0, 8.0, 4.0]), iter([9.0, 9.0, 9.0])
    providers = [Provider("ours", "fp32", ours, is_ours=True), Provider("fast", "fp32", fast)]
    providers.append(Provider("slow", "bf16", slow))
    done = []
    rows = measure(
        "op", "case", providers, operations=100 * 10**9, is_exact=lambda result: result != "slow", rounds=3,
        progress=lambda *now: done.append(now),
    )  # fmt: skip
    assert [row.median_s for row in rows] == [2.0, 4.0, 9.0]
    assert [row.gops for row in rows] == [50.0, 25.0, pytest.approx(100 / 9)]
    assert [row.share_of_ceiling for row in rows] == [0.5, 0.25, None]
    # the best peer's rounds over ours: 2/1, 8/2, 4/4
    assert [row.ratio_to_best_peer for row in rows] == [2.0, 1.0, pytest.approx(4 / 9)]
    assert [row.exact for row in rows] == [True, True, False]
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_without_peers_there_is_no_ratio(clock):
    def ours():
        return None

    clock[ours] = iter([1.0])
    (row,) = measure("op", "case", [Provider("ours", "fp32", ours, True)], operations=1, is_exact=bool, rounds=1)
    assert row.ratio_to_best_peer is None
    assert not row.exact


def test_memory_beyond_what_was_there():
    held = []

    def takes_64_mb():  # from the system: an allocator may have 64 MB left of earlier tests
        held.append(mmap.mmap(-1, 64 * 2**20))
        held[0].write(b"1" * len(held[0]))
        return True

    found, result = interleaved._extra_megabytes(takes_64_mb)
    assert result
    assert math.isnan(found) or 60 < found < 200


def test_a_high_water_mark_that_does_not_come_down_measures_nothing(monkeypatch):
    monkeypatch.setattr(interleaved, "_kilobytes", lambda status, name: {"VmRSS": 50_000, "VmHWM": 90_000}[name])
    found, result = interleaved._extra_megabytes(lambda: "result")
    assert math.isnan(found)
    assert result == "result"


def test_each_provider_runs_at_its_level_and_the_setting_comes_back(monkeypatch):
    monkeypatch.setenv("REP_FAST_ISA", "avx2")
    seen = []
    with interleaved.under_isa("portable"):
        seen.append(os.environ["REP_FAST_ISA"])
    with interleaved.under_isa(""):
        seen.append(os.environ["REP_FAST_ISA"])
    assert seen == ["portable", "avx2"]
    assert os.environ["REP_FAST_ISA"] == "avx2"
    monkeypatch.delenv("REP_FAST_ISA")
    with interleaved.under_isa("portable"):
        pass
    assert "REP_FAST_ISA" not in os.environ


def test_the_scan_is_exact_and_its_plain_peers_find_the_same_without_exclusion(tmp_path):
    module = OPS["whitened_topk"]
    inputs = module.Inputs.draw(TINY, seed=3)
    providers = module.providers(inputs)
    assert any(provider.is_ours for provider in providers)
    rows = measure(
        "whitened_topk", TINY.name, providers, operations=TINY.operations, is_exact=inputs.is_exact, rounds=1
    )
    assert all(row.exact for row in rows if row.provider.startswith("rep_fast"))
    plain = {provider.name: provider.run() for provider in providers if not provider.is_ours}
    unmasked = (inputs.keys.double() @ inputs.queries.double().T).topk(TINY.k, dim=0).indices.T
    assert torch.equal(inputs.unmasked, unmasked)
    for name in ("torch float32 matmul + topk", "numpy float32 matmul + argpartition"):
        assert torch.equal(plain[name].ids, unmasked)
        assert next(row.exact for row in rows if row.provider == name)
    write_csv(tmp_path / "rows.csv", rows, {"cpu": "some, with a comma"})
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [line["provider"] for line in read] == [row.provider for row in rows]
    assert {line["cpu"] for line in read} == {"some, with a comma"}
    assert float(read[0]["gops"]) == pytest.approx(rows[0].gops, rel=1e-4)


def test_ceilings_of_every_level():
    module = native.find().module
    for row in range(module.machine_level() + 1):
        found = Ceilings.measure(level=module.level_name(row), seconds=1e-3, memory_bytes=1 << 22)
        assert found.level == module.level_name(row)
        assert min(found.fp32, found.read, found.copy) > 0
    assert Ceilings.measure(seconds=1e-3, memory_bytes=0).read == 0.0
    assert set(found.to_dict()) == {"level", "threads", "fp32", "bf16", "int8", "read", "copy"}


def test_ceilings_need_the_native_module_and_a_level(monkeypatch):
    with pytest.raises(BackendError, match="instruction set 'mmx' is unknown; use portable"):
        Ceilings.measure(level="mmx")
    monkeypatch.setattr(native, "find", lambda: native.Native(None, "it was not built"))
    with pytest.raises(BackendError, match="measured by the native module: it was not built"):
        Ceilings.measure()


def test_where_a_result_comes_from():
    about = bench.about_this_machine()
    assert f"torch {torch.__version__}" in about["versions"]
    assert about["cpu"]
