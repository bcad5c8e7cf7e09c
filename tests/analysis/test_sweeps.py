"""Sweeps: one column per value, and nothing made twice that does not depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rep_fast.analysis import sweep, with_threshold
from rep_fast.analysis.sweeps import sweep_columns
from rep_fast.api import Workbench
from rep_fast.edits import Edit
from rep_fast.errors import HparamError
from rep_fast.factworld import cases
from rep_fast.models import EditableLM
from rep_fast.report.gathering import sweep_curves


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    lm = EditableLM.from_pretrained("factworld")
    overrides = {"v_steps": 4, "steps": 6}
    return Workbench(lm, overrides=overrides, cache_dir=tmp_path_factory.mktemp("cache"))


CASE = cases("validation")[0]


def counted(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often edits are made and adapters trained."""
    calls = {"edit": 0, "with_rep": 0}

    def counting(name: str) -> Any:
        own = getattr(Workbench, name)

        def call(self: Workbench, *args: Any, **options: Any) -> Edit:
            calls[name] += 1
            return own(self, *args, **options)

        return call

    for name in calls:
        monkeypatch.setattr(Workbench, name, counting(name))
    return calls


def test_thresholds_share_one_adapter(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(bench, monkeypatch)
    columns = sweep_columns(bench, method="rome", name="tau", values=["0.0", 0.75, 1], objective=True)
    edits = [build(CASE, 0) for build in columns.values()]
    assert list(columns) == ["tau=0.0", "tau=0.75", "tau=1"]
    assert [edit.modules[0].adapters[0].tau for edit in edits] == [0.0, 0.75, 1.0]
    weights = [edit.modules[0].adapters[0].weights.w1 for edit in edits]
    assert all(one is weights[0] for one in weights)
    assert calls == {"edit": 1, "with_rep": 1}


@pytest.mark.parametrize(("multilayer", "trained"), [("in_order", 2), ("frozen_keys", 1)])
def test_gates_of_several_layers_are_trained_at_each_threshold(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, multilayer: str, trained: int
) -> None:
    """The adapter of the second layer sees keys as the first one's gate leaves them: open at τ = 0, shut at τ = 1."""
    two_layers = bench.varied({"layers": (1, 2), "multilayer": multilayer})
    calls = counted(bench, monkeypatch)
    columns = sweep_columns(two_layers, method="memit", name="tau", values=["0.0", "1.0"], objective=True)
    edits = [build(CASE, 0) for build in columns.values()]
    assert calls == {"edit": 1, "with_rep": trained}
    adapters = [[module.adapters[0] for module in edit.modules] for edit in edits]
    assert [[adapter.tau for adapter in own] for own in adapters] == [[0.0, 0.0], [1.0, 1.0]]
    (first_open, second_open), (first_shut, second_shut) = adapters
    assert torch.equal(first_open.weights.w1, first_shut.weights.w1)
    assert torch.equal(second_open.weights.b, second_shut.weights.b) == (multilayer == "frozen_keys")


def test_settings_of_rep_share_the_plain_edit(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(bench, monkeypatch)
    columns = sweep_columns(bench, method="rome", name="shift_weight", values=["0.1", "10"], objective="calibrated")
    one, two = (build(CASE, 0) for build in columns.values())
    assert calls == {"edit": 1, "with_rep": 2}
    assert one.modules[0].delta is two.modules[0].delta
    assert not torch.equal(one.modules[0].adapters[0].weights.b, two.modules[0].adapters[0].weights.b)
    assert [e.modules[0].adapters[0].notes["hparams"]["shift_weight"] for e in (one, two)] == [0.1, 10.0]


def test_settings_of_the_editor_reach_it_and_nobody_else(bench: Workbench) -> None:
    columns = sweep_columns(bench, method="rome", name="layer", values=["0", "2"], objective=None)
    assert [build(CASE, 0).layers for build in columns.values()] == [(0,), (2,)]
    assert bench.layer("rome") == 1


def test_a_sweep_is_an_evaluation_with_a_column_per_value(bench: Workbench) -> None:
    found = sweep(bench, [CASE], method="rome", name="v_steps", values=["2", "12"], seeds=[0], text=None)
    assert found.summary.columns == ["v_steps=2", "v_steps=12"]
    assert found.series("success") == [found.summary[c]["success"].mean for c in found.summary.columns]
    assert found.series("long_id") == [None, None]
    curves = sweep_curves(found)
    assert curves.values == ("2", "12")
    assert "long_id" not in curves.series
    assert found.summary.settings["hparams"]["sweep"] == {"name": "v_steps", "values": ["2", "12"]}


def test_a_threshold_changes_nothing_but_the_threshold(bench: Workbench) -> None:
    edit = bench.edit(CASE, rep=True)
    retuned = with_threshold(edit, 0.3)
    (old,), (new,) = edit.modules[0].adapters, retuned.modules[0].adapters
    assert new.weights is old.weights
    assert (new.tau, new.trained_for, new.notes) == (0.3, old.trained_for, old.notes)
    assert with_threshold(bench.edit(CASE), 0.3).modules[0].adapters == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": ["0.5"]}, "at least two different values of tau"),
        ({"values": ["0.5", "0.5"]}, "at least two different values of tau"),
        ({"objective": None}, "is a hyper-parameter of REP; sweep it with REP switched on"),
        ({"values": ["low", "high"]}, "tau must be a number between 0 and 1, got 'low'"),
        ({"name": "nonsense"}, "has no hyper-parameter 'nonsense'"),
        ({"name": "v_steps", "values": ["3", "many"]}, "v_steps must be int, got 'many'"),
    ],
)
def test_refusals(bench: Workbench, changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"name": "tau", "values": ["0.5", "0.9"], "objective": True, **changes}
    with pytest.raises(HparamError, match=message):
        sweep(bench, [CASE], method="rome", **options)
