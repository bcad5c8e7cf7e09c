"""`rep-fast sweep` on a tiny random model."""

from __future__ import annotations


def test_a_page_with_curves(rep_fast, tiny_model, corpus, case_file, settings, tmp_path):
    out = tmp_path / "sweep"
    command = ["sweep", "--model", tiny_model, "--text", corpus, "--cases", case_file, *settings, "--limit", "1"]
    done = rep_fast(*command, "--name", "tau", "--values", "0.2,0.9", "--rep", "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["values"] == ["0.2", "0.9"]
    assert set(done.json["metrics"]) == {"tau=0.2", "tau=0.9"}
    page = (out / "index.html").read_text()
    assert "What a setting does" in page
    assert "<svg" in page
    assert (out / "summary.csv").is_file()


def test_mistakes_are_one_sentence(rep_fast, tiny_model, corpus, case_file, settings):
    command = ["sweep", "--model", tiny_model, "--text", corpus, "--cases", case_file, *settings]
    for options, code, message in (
        (["--name", "tau", "--values", "0.5"], 1, "at least two different values"),
        (["--name", "tau", "--values", "0.5,0.6"], 1, "switched on"),
        (["--name", "tau", "--values", "0.5,0.6", "--rep", "--resume"], 2, "needs --out"),
    ):
        done = rep_fast(*command, *options)
        assert done.code == code
        assert message in done.err
