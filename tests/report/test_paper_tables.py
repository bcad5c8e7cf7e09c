"""Runs in the layout of the papers' tables, and the printed rows beside them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from rep_fast.errors import CorruptFileError, HparamError, MissingFileError
from rep_fast.evaluation import PROTOCOL_OF
from rep_fast.report import paper_table, read_run, render_table
from rep_fast.report.paper_tables import LAYOUTS, MEASURED, fitting_layout, fitting_tables, method_label
from rep_fast.report.published import published_names, published_table


def run(regime: str = "single", seeds: int = 1, **columns: dict[str, float]) -> dict[str, Any]:
    cells = {
        column: {name: {"mean": value, "std": 0.5, "n": 10, "protocol": "REP"} for name, value in own.items()}
        for column, own in columns.items()
    }
    return {
        "columns": cells,
        "settings": {"model": "/models/tiny <b>", "cases": 10, "seeds": list(range(seeds)), "regime": regime},
    }


@pytest.mark.parametrize("name", published_names())
def test_printed_tables_are_read_whole(name: str) -> None:
    table = published_table(name)
    assert table.layout in LAYOUTS
    assert table.anomalies
    assert len(table.rows) >= 2
    for row in table.rows:
        assert row.values
        assert all(0 <= value <= 100 for key, (value, _) in row.values.items() if key != "fluency")


def test_a_printed_number_and_its_spread() -> None:
    rows = {(row.model, row.method): row for row in published_table("rep_v2_table2_counterfact").rows}
    assert rows["LLaMA2-7B", "ROME+REP"].values["shuffle_ood"] == (28.7, 1.9)
    assert rows["LLaMA2-7B", "ROME"].values["fluency"] == (587.4, 1.2)
    (deltas,) = (row for row in published_table("rep_v2_table1_llama2_counterfact").rows if row.method == "MEMIT+REP")
    assert not any("delta" in name for name in deltas.values)


def test_measured_rows_stand_first_and_say_what_they_are() -> None:
    measured = run(seeds=3, rome={"success": 97.4, "rephrase_ood": 58.3}, **{"rome+rep": {"success": 97.3}})
    table = paper_table([measured], [published_table("rep_v2_table2_counterfact")], layout="rep")
    first, second, third = table.rows[:3]
    assert (first.source, first.method, first.model, first.regime) == (MEASURED, "ROME", "tiny <b>", "single")
    assert first.protocol == "REP"
    assert first.values["success"] == (97.4, 0.5)
    assert second.method == "ROME+REP"
    assert third.source == "REP, Table 2"
    assert any("ridge-damped" in note for note in table.footnotes)
    parsed = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(parsed) == len(table.rows)
    assert (parsed[0]["success"], parsed[0]["success_std"], parsed[1]["rephrase_ood"]) == ("97.4", "0.5", "")
    json.dumps(table.to_dict(), allow_nan=False)


def test_one_seed_has_no_spread() -> None:
    table = paper_table([run(rome={"success": 97.4})], [], layout="rep")
    assert table.rows[0].values["success"] == (97.4, None)
    assert list(table.headings) == ["success"]


def test_path_metrics_find_their_printed_columns() -> None:
    measured = run("sequential:200", pac={"path_efficacy": 90.0, "path_score": 60.0})
    table = paper_table([measured], [published_table("path_table2_consecutive")], layout="path")
    printed = next(row for row in table.rows if (row.model, row.dataset, row.method) == ("GPT-J-6B", "ZsRE", "PAC"))
    assert printed.values["path_efficacy"] == (88.74, None)
    assert printed.values["path_score"] == (63.17, None)
    assert table.headings["path_efficacy"] == "Efficacy"


def test_columns_are_metrics_by_their_names_and_protocols() -> None:
    protocols = {"rep": "REP", "path": "PAC"}
    for layout, metrics in LAYOUTS.items():
        assert {PROTOCOL_OF[name] for name in metrics} == {protocols[layout]}


def test_what_fits_a_run() -> None:
    known = [published_table(name) for name in published_names()]
    single, sequence = run(rome={"success": 1.0}), run("sequential:200", rome={"path_efficacy": 1.0})
    five = run("sequential:5", rome={"success": 79.3, "rephrase_ood": 59.9})
    single = run(rome={"success": 1.0, "rephrase_ood": 2.0})
    assert fitting_layout([single]) == fitting_layout([single, five]) == "rep"
    assert fitting_layout([single, sequence]) == "path"
    assert [one.name for one in fitting_tables([five], "rep", known)] == ["rep_v2_table4_sequential5"]
    # the AlphaEdit study's groups of 100 are written on the running model, not each on the clean one
    running = run("cumulative:100", memit={"path_efficacy": 1.0})
    assert [one.name for one in fitting_tables([running], "path", known)] == ["path_table1_batch100"]
    assert fitting_tables([run("batch:100", memit={"path_efficacy": 1.0})], "path", known) == []
    assert [one.name for one in fitting_tables([sequence], "path", known)] == ["path_table2_consecutive"]
    fitting = [one.name for one in fitting_tables([single], "rep", known)]
    assert fitting == ["rep_v2_table2_counterfact", "rep_v2_table3_zsre"]


def test_the_page_escapes_names_and_needs_nothing_else() -> None:
    page = render_table(
        paper_table([run(rome={"success": 97.4})], [published_table("rep_v2_table3_zsre")], layout="rep")
    )
    assert "tiny &lt;b&gt;" in page
    assert "<b>97.4</b>" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("column", "label"), [("rome+rep", "ROME+REP"), ("alphaedit", "AlphaEdit"), ("rome+rep[paper]", "ROME+REP[PAPER]")]
)
def test_method_labels(column: str, label: str) -> None:
    assert method_label(column) == label


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(HparamError, match="no published table 'x'; choose from rep_v1"):
        published_table("x")
    with pytest.raises(HparamError, match="layout 'x' is unknown; choose from rep, path"):
        paper_table([], [], layout="x")
    with pytest.raises(HparamError, match="has the layout 'path', not 'rep'"):
        paper_table([], [published_table("path_table1_batch100")], layout="rep")
    with pytest.raises(MissingFileError, match="holds no finished run"):
        read_run(tmp_path)
    (tmp_path / "summary.json").write_text('{"columns": 3}')
    with pytest.raises(CorruptFileError, match="is damaged"):
        read_run(tmp_path)
