"""One hyper-parameter over several values, everything else held fixed (methods §12.5, §12.7).

A sweep is an evaluation with one column per value. What does not depend on the value is made once per record: the plain
edit where REP's settings vary, the trained adapter too where only its threshold τ does and no adapter is trained on
keys that gates below it have changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rep_fast.api import BuildEdit, Remembered, Workbench
from rep_fast.edits import Edit
from rep_fast.errors import HparamError
from rep_fast.evaluation import Summary, evaluate_single
from rep_fast.facts import EditCase
from rep_fast.presets import field_names
from rep_fast.rep import RepHparams

TAU = "tau"


@dataclass(frozen=True)
class Sweep:
    """What came out: name of the hyper-parameter, its values, and a summary with one column per value, in order."""

    name: str
    values: tuple[Any, ...]
    summary: Summary

    def series(self, metric: str) -> list[float | None]:
        """A metric in percent at each value, None where a column lacks it."""
        cells = [self.summary[column_name(self.name, value)].get(metric) for value in self.values]
        return [None if cell is None else cell.mean for cell in cells]


def column_name(name: str, value: Any) -> str:
    """The column of one value."""
    return f"{name}={value}"


def sweep(
    bench: Workbench,
    cases: Sequence[EditCase],
    *,
    method: str,
    name: str,
    values: Sequence[Any],
    objective: str | bool | None = None,
    **options: Any,
) -> Sweep:
    """Evaluate every record at every value.

    Args:
        method: editor. objective: REP's, True for the preset's default, None for the plain edit.
        name: a hyper-parameter of the editor or, with an objective, of REP. values: at least two, all different.
        options: of `evaluate_single`: seeds, text, protocol, out_dir, resume, progress …
    Raises:
        HparamError: too few values or equal ones, a hyper-parameter of REP without REP, or one nobody has.
    """
    values = tuple(values)
    if len(values) < 2 or len({str(value) for value in values}) < len(values):
        raise HparamError(f"a sweep needs at least two different values of {name}, got {list(values)}")
    columns = sweep_columns(bench, method=method, name=name, values=values, objective=objective)
    settings = {**bench.settings([method], [objective]), "sweep": {"name": name, "values": list(values)}}
    return Sweep(name, values, evaluate_single(bench.lm, cases, columns, settings=settings, **options))


def sweep_columns(
    bench: Workbench, *, method: str, name: str, values: Sequence[Any], objective: str | bool | None
) -> Mapping[str, BuildEdit]:
    """One column per value; see `sweep`."""
    is_of_rep = name in field_names(RepHparams)
    if is_of_rep and objective is None:
        raise HparamError(f"{name} is a hyper-parameter of REP; sweep it with REP switched on")
    chosen = None if objective is None else bench.rep_hparams(None if objective is True else str(objective)).objective
    plain = bench.plain_column(method)
    trained = bench.rep_column(plain, chosen) if chosen is not None else plain
    if name == TAU and not _trains_behind_gates(bench, method, chosen):
        return _threshold_columns(trained, values)
    columns: dict[str, BuildEdit] = {}
    for value in values:
        varied = bench.varied({name: value})
        # wrong names and values are refused before the first edit
        if is_of_rep:
            varied.rep_hparams(chosen)
        else:
            varied.hparams(method)
        start = plain if is_of_rep else varied.plain_column(method)
        columns[column_name(name, value)] = start if chosen is None else varied.rep_column(start, chosen)
    return columns


def _trains_behind_gates(bench: Workbench, method: str, objective: str | None) -> bool:
    """Whether adapters of several layers are trained in order, each on keys that the gates below have changed."""
    is_in_order = bench.rep_hparams(objective, method=method).multilayer == "in_order"
    return is_in_order and len(bench.layers(method)) > 1


def _threshold_columns(trained: BuildEdit, values: Sequence[Any]) -> dict[str, BuildEdit]:
    """Training looks at τ only through the gates of layers below: without them one adapter serves all thresholds."""
    shared = Remembered(trained)

    def column(tau: float) -> BuildEdit:
        return lambda case, seed: with_threshold(shared(case, seed), tau)

    return {column_name(TAU, value): column(_threshold(value)) for value in values}


def with_threshold(edit: Edit, tau: float) -> Edit:
    """The edit with another threshold τ at every adapter."""
    retuned = {
        module.layer: [dataclasses.replace(adapter, tau=tau) for adapter in module.adapters]
        for module in edit.modules
        if module.adapters
    }
    return edit.with_adapters(retuned)


def _threshold(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise HparamError(f"tau must be a number between 0 and 1, got {value!r}") from None
