"""The papers' printed tables as data, each with what must be known before a number is set beside another."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from rep_fast.errors import HparamError

_NAMES_OF_ROWS = ("model", "dataset", "regime", "editor", "rep", "method", "n_sequential_edits")


@dataclass(frozen=True)
class PublishedRow:
    """One printed row: model, data set, method, and name of a column → (value, standard deviation where printed)."""

    model: str
    dataset: str
    method: str
    values: Mapping[str, tuple[float, float | None]]


@dataclass(frozen=True)
class PublishedTable:
    """One printed table.

    name: of its file. layout: which columns it has ("rep" or "path"). regime: how edits were made ("single",
    "cumulative", "sequential"). protocol: what its numbers count. anomalies: sentences a reader must know.
    is_superseded: another table prints the same quantities for more models or seeds.
    """

    name: str
    title: str
    layout: str
    regime: str
    protocol: str
    anomalies: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    is_superseded: bool = False


def published_names() -> tuple[str, ...]:
    """Names that `published_table` knows."""
    return tuple(_descriptions()["tables"])


def published_table(name: str) -> PublishedTable:
    """One printed table by name.

    Raises:
        HparamError: no such table.
    """
    descriptions = _descriptions()
    if name not in descriptions["tables"]:
        known = ", ".join(descriptions["tables"])
        raise HparamError(f"there is no published table {name!r}; choose from {known}, or none")
    description = dict(descriptions["tables"][name])
    anomalies = tuple(descriptions["anomalies"][key] for key in description.pop("anomalies"))
    text = (resources.files(__name__) / f"{name}.csv").read_text(encoding="utf-8")
    rows = tuple(_row(raw) for raw in csv.DictReader(text.splitlines()))
    return PublishedTable(name=name, anomalies=anomalies, rows=rows, **description)


def _descriptions() -> dict[str, Any]:
    return yaml.safe_load((resources.files(__name__) / "tables.yaml").read_text(encoding="utf-8"))


def _row(raw: Mapping[str, str]) -> PublishedRow:
    values = {
        name: (float(text), float(raw[f"{name}_std"]) if raw.get(f"{name}_std") else None)
        for name, text in raw.items()
        if text and name not in _NAMES_OF_ROWS and not name.endswith(("_std", "_printed_delta"))
    }
    return PublishedRow(raw["model"], raw["dataset"], raw["method"], values)
