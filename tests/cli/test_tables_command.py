"""`rep-fast tables` on a run of a tiny random model."""

from __future__ import annotations


def test_a_run_beside_the_printed_rows(rep_fast, tiny_model, corpus, case_file, settings, tmp_path):
    out = tmp_path / "run"
    options = ["--text", corpus, "--cases", case_file, *settings, "--out", out]
    done = rep_fast("evaluate", "--model", tiny_model, *options)
    assert done.code == 0, done.err
    shown = rep_fast("tables", out, "--csv", tmp_path / "t.csv", "--html", tmp_path / "t.html")
    assert shown.code == 0, shown.err
    assert "measured" in shown.out
    assert "REP, Table 2" in shown.out
    assert "ridge-damped" in shown.out
    assert (tmp_path / "t.csv").read_text().startswith("source,model,dataset,regime,method,protocol,success,")
    assert "<!doctype html>" in (tmp_path / "t.html").read_text()
    alone = rep_fast("tables", out, "--published", "none", "--json").json
    assert {row["source"] for row in alone["rows"]} == {"measured"}
    assert alone["footnotes"] == []


def test_mistakes_are_one_sentence(rep_fast, tmp_path):
    for arguments, message in (
        ((tmp_path / "none",), "holds no finished run"),
        ((tmp_path, "--csv", tmp_path), "cannot write"),
    ):
        done = rep_fast("tables", *arguments)
        assert done.code == 1
        assert message in done.err
