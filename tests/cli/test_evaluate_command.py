"""`rep-fast evaluate`: the JSON object scripts rely on, run directories, resuming."""

from __future__ import annotations

import json

import pytest

from rep_fast.api import Workbench
from rep_fast.cli.evaluate import CEILING_METHODS
from rep_fast.editors import names as editor_names
from rep_fast.errors import HparamError, NothingToEditError
from rep_fast.evaluation.oracle import wanted_value
from rep_fast.facts import Fact
from rep_fast.models import EditableLM

METRICS = (
    "success",
    "locality",
    "paraphrase",
    *(f"{kind}_{side}" for kind in ("rephrase", "shuffle", "long") for side in ("id", "ood")),
)


@pytest.fixture
def command(tiny_model, corpus, case_file, settings):
    """An evaluation of two records."""
    return [
        "evaluate", "--model", tiny_model, "--cases", case_file, "--limit", "2", "--method", "rome", "--text", corpus,
        "--preset", "factworld", *settings,
    ]  # fmt: skip


def test_prints_the_object_scripts_rely_on(rep_fast, command):
    done = rep_fast(*command, "--rep", "--rep-objective", "paper", "--seeds", "0,1", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert {"model", "cases", "seeds", "backend", "timing", "metrics"} <= found.keys()
    assert (found["regime"], found["n_edits"], found["checkpoints"]) == ("single", 1, {})
    assert found["cases"] == 2
    assert found["seeds"] == [0, 1]
    assert list(found["metrics"]) == ["rome", "rome+rep", "rome+rep[paper]"]
    for column in found["metrics"].values():
        for name in METRICS:
            assert column[name].keys() == {"mean", "std", "n"}
            assert 0.0 <= column[name]["mean"] <= 100.0
    assert found["metrics"]["rome"]["success"]["n"] == 4
    assert found["failures"] == {column: [] for column in found["metrics"]}


def test_metrics_without_prompts_are_null(rep_fast, command, case_file):
    records = json.loads(case_file.read_text())
    for record in records:
        record["rephrase_prompt"] = None
    case_file.write_text(json.dumps(records))
    found = rep_fast(*command, "--json").json
    assert found["metrics"]["rome"]["paraphrase"] == {"mean": None, "std": None, "n": 0}


def test_a_run_directory_is_resumed_and_not_overwritten(rep_fast, command, tmp_path):
    out = tmp_path / "run"
    first = rep_fast(*command, "--out", out, "--json")
    assert first.code == 0, first.err
    lines = (out / "results.jsonl").read_text().splitlines()
    (out / "results.jsonl").write_text(lines[0] + "\n")

    again = rep_fast(*command, "--out", out)
    assert again.code == 1
    assert "--resume" in again.err
    assert (out / "results.jsonl").read_text() == lines[0] + "\n"

    resumed = rep_fast(*command, "--out", out, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["metrics"] == first.json["metrics"]
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


def test_resuming_begins_a_run_that_was_never_started_and_says_so(rep_fast, command, tmp_path):
    done = rep_fast(*command, "--out", tmp_path / "run", "--resume")
    assert done.code == 0
    assert f"no run in {tmp_path / 'run'} yet: this one begins there" in done.err
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 2
    again = rep_fast(*command, "--out", tmp_path / "run", "--resume")
    assert (again.code, "begins there" in again.err) == (0, False)


def test_resuming_among_other_files_is_refused_before_the_work(rep_fast, command, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    done = rep_fast(*command, "--out", out, "--resume")
    assert (done.code, done.err) == (1, f"error: '{out}' is not empty; it holds no run: choose another --out\n")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_file_in_place_of_the_run_is_refused_before_the_work(rep_fast, command, tmp_path, monkeypatch, resume):
    monkeypatch.setattr(EditableLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("mine")
        done = rep_fast(*command, "--out", place, *resume)
        refusal = f"error: cannot write to {place} (Not a directory); choose another --out\n"
        assert (done.code, done.err) == (1, refusal)


def test_resuming_with_other_settings_is_refused_by_name(rep_fast, command, tmp_path):
    out = tmp_path / "run"
    assert rep_fast(*command, "--out", out).code == 0
    before = (out / "results.jsonl").read_bytes()
    other = rep_fast(*command, "--seeds", "1", "--out", out, "--resume")
    assert other.code == 1
    assert "seeds" in other.err
    assert (out / "results.jsonl").read_bytes() == before


def test_an_interruption_says_what_is_kept(rep_fast, command, tmp_path, monkeypatch):
    from rep_fast.cli.screen import Screen

    def interrupt(self, label, done, total):
        if label == "evaluate":
            raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Screen, "progress", interrupt)
        done = rep_fast(*command, "--out", out)
    assert done.code == 1
    assert str(out) in done.err
    assert "--resume" in done.err
    assert len((out / "results.jsonl").read_text().splitlines()) == 1
    assert rep_fast(*command, "--out", out, "--resume").code == 0


def test_the_table_names_every_column(rep_fast, command):
    done = rep_fast(*command, "--rep")
    assert done.code == 0, done.err
    for word in ("rome", "rome+rep", "rephrase_ood", "REP"):
        assert word in done.out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--seeds", "a"], "whole numbers"),
        (["--set", "v_steps"], "NAME=VALUE"),
        (["--resume"], "--out"),
        (["--keep-edits"], "--out"),
    ],
)
def test_usage_errors_have_status_2(rep_fast, command, options, word):
    done = rep_fast(*command, *options)
    assert done.code == 2
    assert word in done.err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--method", "magic"], "magic"),
        (["--rep-objective", "other"], "other"),
        (["--set", "no_such=1"], "no_such"),
        (["--preset", "nowhere"], "nowhere"),
        (["--layers", "99"], "99"),
        (["--layers", "1,2"], "rome edits one layer, got [1, 2]; name one"),
        (["--regime", "batch"], "regime 'batch' is unknown; write single, batch:100"),
        (["--regime", "cumulative:0"], "it must be 1 or more"),
        (["--transform", "shrink"], "transform 'shrink' is unknown; write prune, prune:1.2, rect or rect:40"),
        (["--evaluate-every", "1"], "is evaluated after its 1 edit anyway"),
        (["--regime", "sequential:2", "--ceiling"], "take it in regime single"),
        (["--regime", "batch:2"], "rome writes one fact at a time, got 2"),
        (["--metrics", "success,wisdom"], "metric 'wisdom' is unknown; choose from success"),
        (["--references", "nowhere.json"], "there is no file of reference texts nowhere.json"),
    ],
)
def test_unknown_names_are_told_in_one_sentence(rep_fast, command, options, word):
    done = rep_fast(*command, *options)
    assert done.code == 1
    assert done.err.strip().splitlines()[-1].startswith("error: ")
    assert word in done.err
    assert "Traceback" not in done.err


def test_the_ceiling_is_a_column_of_its_own(rep_fast, command):
    done = rep_fast(*command, "--ceiling", "--json")
    assert done.code == 0, done.err
    assert list(done.json["metrics"]) == ["rome", "ceiling"]


@pytest.mark.parametrize(
    ("method", "named"), [("memit", "'memit' at layers [1]"), ("kn", "'kn' at layers"), ("ft,rome", "'ft' at layers")]
)
def test_a_ceiling_that_cannot_be_taken_is_refused_before_the_run(
    rep_fast, command, tmp_path, monkeypatch, method, named
):
    monkeypatch.setattr(Workbench, "prepare", lambda *_, **__: pytest.fail("the run was prepared"))
    command[command.index("rome")] = method
    settings = command[: command.index("--set")]  # these editors have other ones
    done = rep_fast(*settings, "--ceiling", "--out", tmp_path / "run")
    assert (done.code, (tmp_path / "run").exists()) == (1, False)
    assert named in done.err
    assert "name rome or r-rome first in --method, or leave --ceiling out" in done.err


@pytest.mark.parametrize("method", editor_names())
def test_a_ceiling_is_offered_where_an_edit_carries_its_value(tiny_model, corpus, method):
    overrides = {} if method == "kn" else {"layer": 1}
    bench = Workbench(EditableLM.from_pretrained(tiny_model), text=corpus, preset="factworld", overrides=overrides)
    fact = Fact("{} belongs to the continent of", "Slovenia", "Antarctica", "Europe")
    try:
        wanted_value(bench.edit(fact, method=method))
    except HparamError:
        assert method not in CEILING_METHODS
    else:
        assert method in CEILING_METHODS


def test_edits_are_stacked_and_asked_about_on_the_way(rep_fast, command, tmp_path):
    out = tmp_path / "run"
    done = rep_fast(
        *command, "--rep", "--regime", "sequential", "--evaluate-every", "1", "--out", out, "--keep-edits", "--json",
        "--shuffle",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = done.json
    assert (found["regime"], found["n_edits"]) == ("sequential", 2)
    assert list(found["metrics"]) == ["rome", "rome+rep"]
    for column, points in found["checkpoints"].items():
        assert [points[n]["success"]["n"] for n in ("1", "2")] == [1, 2]
        assert points["2"]["success"] == found["metrics"][column]["success"]
    assert found["protocols"]["success"] == "REP"
    assert json.loads((out / "settings.json").read_text())["protocol"]["record_order"] == "seed"
    assert len(list((out / "edits").rglob("*.safetensors"))) == 4
    assert "sequential,checkpoint,1,rome,success,REP," in (out / "summary.csv").read_text()


@pytest.mark.parametrize("name", ["prune", "rect:40"])
def test_accumulated_updates_are_transformed_on_factworld(rep_fast, corpus, name):
    done = rep_fast(
        "evaluate", "--model", "factworld", "--limit", "3", "--regime", "sequential", "--transform", name, "--set",
        "v_steps=3", "--text", corpus, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (done.json["regime"], done.json["n_edits"], done.json["transform"]) == ("sequential", 3, name)
    assert done.json["metrics"]["rome"]["success"]["n"] == 3


def test_a_group_with_too_few_records_is_told_of(rep_fast, command):
    done = rep_fast(*command, "--regime", "sequential:3")
    assert done.code == 0, done.err
    assert "regime sequential:3: there are only 2 records, they make one group" in done.err
    assert "regime sequential:3, 2 records written to one model" in done.out


@pytest.mark.parametrize("asked", [["--fluency"], ["--metrics", "fluency"]])
def test_fluency_is_measured_when_asked_for(rep_fast, command, asked, tmp_path):
    pytest.importorskip("nltk", reason="nltk is not installed")
    plain = rep_fast(*command, "--json").json
    assert "fluency" not in plain["metrics"]["rome"]
    done = rep_fast(*command, *asked, "--json")
    assert done.code == 0, done.err
    assert done.json["metrics"]["rome"]["fluency"]["n"] == 2
    assert done.json["protocols"]["fluency"] == "REP"


def test_consistency_needs_reference_texts(rep_fast, command, tmp_path):
    pytest.importorskip("nltk", reason="nltk is not installed")
    references = tmp_path / "references.json"
    references.write_text(json.dumps({"Antarctica": ["Antarctica is a continent of ice"]}))
    done = rep_fast(*command, "--references", references, "--json")
    assert done.code == 0, done.err
    assert done.json["metrics"]["rome"]["consistency"]["n"] == 2


def test_the_table_shows_the_metrics_that_were_named(rep_fast, command):
    done = rep_fast(*command, "--metrics", "success,path_score")
    assert done.code == 0, done.err
    assert "path_score" in done.out
    assert "locality" not in done.out


@pytest.mark.parametrize(("options", "left_out"), [([], 1), (["--ask-edited-neighbours"], 0)])
def test_neighbours_that_the_group_edits_are_counted_or_asked(rep_fast, command, case_file, options, left_out):
    records = json.loads(case_file.read_text())
    records[0]["locality_prompt"].append(records[1]["prompt"])
    case_file.write_text(json.dumps(records))
    done = rep_fast(*command, "--regime", "sequential", *options, "--json")
    assert done.code == 0, done.err
    assert done.json["neighbours_left_out"] == {"rome": left_out}
    assert done.json["metrics"]["rome"]["locality"]["n"] == 3 - left_out


@pytest.mark.parametrize("regime", ["batch:2", "cumulative:1"])
def test_batch_methods_write_several_records(rep_fast, command, regime):
    command[command.index("rome")] = "memit"
    done = rep_fast(*command, "--regime", regime, "--json")
    assert done.code == 0, done.err
    assert (done.json["regime"], done.json["n_edits"]) == (regime, 2)
    assert done.json["metrics"]["memit"]["success"]["n"] == 2


@pytest.fixture
def contradicting(case_file):
    """Records 0 and 1 say two things with the same words."""
    records = json.loads(case_file.read_text())[:2]
    records[1] |= {key: records[0][key] for key in ("prompt", "subject")} | {"target_new": "Asia"}
    case_file.write_text(json.dumps(records))


@pytest.mark.usefixtures("contradicting")
@pytest.mark.parametrize("method", ["memit", "ft"])
def test_records_that_contradict_each_other_are_refused_by_name(rep_fast, command, settings, method):
    quick = settings if method == "memit" else ["--layers", "1", "--set", "ft_steps=2"]
    batch = [*command[: -len(settings)], *quick, "--method", method, "--regime", "batch:2"]
    refused = rep_fast(*batch)
    assert refused.code == 1
    assert "cases 0 and 1 contradict each other in one edit" in refused.err
    assert "'Antarctica' and 'Asia'; leave one out, or take both with --allow-conflicts" in refused.err
    allowed = rep_fast(*batch, "--allow-conflicts", "--json")
    assert allowed.code == 0, allowed.err
    assert allowed.json["metrics"][method]["success"]["n"] == 2


@pytest.mark.usefixtures("contradicting")
def test_records_of_different_edits_may_contradict_each_other(rep_fast, command):
    assert rep_fast(*command, "--method", "memit").code == 0


def test_a_run_that_edited_nothing_has_failed(rep_fast, command, monkeypatch):
    def refuse(self, *_args, **_options):
        raise NothingToEditError("the model already answers so")

    assert rep_fast(*command).code == 0
    monkeypatch.setattr(Workbench, "edit", refuse)
    done = rep_fast(*command)
    assert done.code == 1
    assert "no record could be edited, so nothing was measured; the first reason: case 0" in done.err
    assert "the model already answers so" in done.err.splitlines()[-1]
