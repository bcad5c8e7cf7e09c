"""`rep-fast bench`: what it prints, keeps and refuses; small cases, no time is tested."""

from __future__ import annotations

import pytest

from rep_fast.bench import GateCase, ScanCase, gated_adapter, whitened_topk


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(whitened_topk, "CASES", (ScanCase("small", 200, 5, 32), ScanCase("other", 100, 3, 16)))
    monkeypatch.setattr(gated_adapter, "CASES", (GateCase("gates", 5, 40, 6, n_adapters=3, n_calls=2),))


def test_ceilings_are_the_default(rep_fast):
    done = rep_fast("bench", "--json")
    assert done.code == 0, done.err
    levels = [found["level"] for found in done.json["ceilings"]]
    assert levels[0] == "portable"
    assert "Gop/s" in rep_fast("bench").out


def test_rows_beside_the_peers(rep_fast, tmp_path):
    out = tmp_path / "rows.csv"
    done = rep_fast("bench", "whitened_topk", "--cases", "small", "--rounds", "1", "--csv", out, "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert {row["case"] for row in rows} == {"small"}
    assert {"op", "case", "provider", "dtype", "threads", "median_s", "gops", "share_of_ceiling"} < set(rows[0])
    assert all(row["exact"] for row in rows if row["provider"].startswith("rep_fast"))
    assert out.read_text().startswith("op,case,provider,dtype,threads,median_s,")
    shown = rep_fast("bench", "whitened_topk", "--rounds", "1").out
    assert "small" in shown
    assert "other" in shown


def test_gates_beside_the_eager_module(rep_fast):
    done = rep_fast("bench", "gated_adapter", "--rounds", "1", "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert {row["case"] for row in rows} == {"gates"}
    assert {row["provider"] for row in rows} > {"torch eager fp32", "torch eager bf16"}
    assert all(row["exact"] for row in rows)
    assert all(row["gops"] > 0 for row in rows)


def test_unknown_names_are_refused(rep_fast):
    done = rep_fast("bench", "whitened_topk", "--cases", "small,huge")
    assert (done.code, done.err) == (
        1,
        "error: case 'huge' of whitened_topk is unknown; choose from small, other\n",
    )
    wrong = rep_fast("bench", "whitened")
    assert wrong.code == 1
    assert wrong.err.startswith("error: there is nothing called 'whitened' to measure; choose from ceilings, ")


def test_options_that_say_nothing_about_ceilings_are_refused(rep_fast, tmp_path):
    assert rep_fast("bench", "ceilings", "--csv", tmp_path / "rows.csv").code == 2
    assert rep_fast("bench", "--cases", "small").code == 2


def test_a_place_that_cannot_be_written_is_refused_before_the_work(rep_fast, tmp_path, monkeypatch):
    monkeypatch.setattr(whitened_topk.Inputs, "draw", lambda *_, **__: pytest.fail("it was measured"))
    done = rep_fast("bench", "whitened_topk", "--csv", tmp_path)
    assert done.code == 1
    assert "cannot write to" in done.err
    assert "choose another --csv" in done.err


def test_the_instruction_set_is_capped_as_everywhere(rep_fast, monkeypatch):
    monkeypatch.setenv("REP_FAST_ISA", "portable")
    done = rep_fast("bench", "whitened_topk", "--cases", "small", "--rounds", "1", "--json")
    assert [found["level"] for found in done.json["ceilings"]] == ["portable"]
    ours = [row["provider"] for row in done.json["rows"] if row["provider"].startswith("rep_fast")]
    assert ours == ["rep_fast portable fp32"]
    monkeypatch.setenv("REP_FAST_ISA", "mmx")
    refused = rep_fast("bench")
    assert refused.code == 1
    assert "REP_FAST_ISA: instruction set 'mmx' is unknown" in refused.err
