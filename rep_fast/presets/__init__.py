"""Presets: hyper-parameters per method and model family, kept as YAML beside this file.

A preset has one section per method (`rome`, `r-rome`, `rep`, `evaluation` …) with flat names; `by_family` inside a
section overrides it for one model family, `by_method` (REP's sections) for the edits of one method, `like` takes
another section as the start, and `extends` at the top names the preset that everything not said is taken from.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from rep_fast.errors import HparamError

BY_FAMILY, BY_METHOD = "by_family", "by_method"


@dataclass(frozen=True)
class Preset:
    """One preset with everything it extends already filled in."""

    name: str
    sections: Mapping[str, Mapping[str, Any]]

    def section(self, name: str, *, family: str | None = None, method: str | None = None) -> dict[str, Any]:
        """Flat values of one section, for one model family and, in REP's sections, the edits of one method."""
        raw = dict(self.sections.get(name, {}))
        start = self.section(raw.pop("like"), family=family, method=method) if "like" in raw else {}
        by_family, by_method = raw.pop(BY_FAMILY, {}), raw.pop(BY_METHOD, {})
        return {**start, **raw, **by_family.get(family, {}), **by_method.get(method, {})}


def preset_names() -> tuple[str, ...]:
    """Names of the presets that come with the package."""
    files = resources.files("rep_fast.presets").iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def load_preset(name: str) -> Preset:
    """Read a preset.

    Raises:
        HparamError: no such preset.
    """
    if name not in preset_names():
        raise HparamError(f"preset {name!r} is unknown; choose from {', '.join(preset_names())}")
    content = yaml.safe_load((resources.files("rep_fast.presets") / f"{name}.yaml").read_text(encoding="utf-8"))
    base = load_preset(content.pop("extends")).sections if "extends" in content else {}
    sections = {key: _merged(base.get(key, {}), content.get(key, {})) for key in {**base, **content}}
    return Preset(name, sections)


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`; a value said by the extending preset also wins over the base's `by_family` and `by_method`."""
    special = {kind: _merged_special(base.get(kind, {}), own, own.get(kind, {})) for kind in (BY_FAMILY, BY_METHOD)}
    return {**base, **own, **{kind: values for kind, values in special.items() if values}}


def _merged_special(
    base: Mapping[str, Mapping[str, Any]], said: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    merged = {name: {key: value for key, value in values.items() if key not in said} for name, values in base.items()}
    for name, values in own.items():
        merged[name] = {**merged.get(name, {}), **values}
    return merged


def flat_mapping(hparams: Any) -> dict[str, Any]:
    """A dataclass as flat names and JSON values; nested dataclasses lie on the same level."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(hparams):
        value = getattr(hparams, entry.name)
        if dataclasses.is_dataclass(value):
            flat |= flat_mapping(value)
        else:
            flat[entry.name] = list(value) if isinstance(value, tuple) else value
    return flat


def field_names(kind: type) -> frozenset[str]:
    """Flat names of a (nested) dataclass."""
    return frozenset(_flat_fields(kind))


def from_flat_mapping(kind: type, values: Mapping[str, Any], *, where: str) -> Any:
    """Build a (nested) dataclass from flat names, checking names and types.

    Raises:
        HparamError: a name that no field has, a value of another type, a missing value; `where` is named.
    """
    known = _flat_fields(kind)
    for name in values:
        if name not in known:
            raise HparamError(f"{where} has no hyper-parameter {name!r}; it has {', '.join(sorted(known))}")
    return _build(kind, {name: _typed(value, known[name], name, where) for name, value in values.items()}, where)


def _flat_fields(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        flat |= _flat_fields(hint) if dataclasses.is_dataclass(hint) else {entry.name: hint}  # type: ignore[arg-type]
    return flat


def _build(kind: type, values: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            arguments[entry.name] = _build(hint, values, where)  # type: ignore[arg-type]
        elif entry.name in values:
            arguments[entry.name] = values[entry.name]
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise HparamError(f"{where} needs a value for {entry.name!r}; set it with --set {entry.name}=…")
    return kind(**arguments)


def _typed(value: Any, hint: Any, name: str, where: str) -> Any:
    """`value` as the field's type; text from the command line is read as YAML."""
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise HparamError(f"{where}: {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        return value
    if typing.get_origin(hint) is tuple:
        return _whole_numbers(value, name, where)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, str) and str not in allowed:
        value = yaml.safe_load(value)
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            value = _number(value)
    if value is None and type(None) in allowed:
        return None
    for kind in allowed:
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind in (int, str, bool) and type(value) is kind:
            return value
    expected = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
    raise HparamError(f"{where}: {name} must be {expected}, got {value!r}")


def _whole_numbers(value: Any, name: str, where: str) -> tuple[int, ...]:
    """A list of YAML, a tuple, one number, or text of the command line such as "4,5,6"."""
    found = [part.strip() for part in value.strip("[] ").split(",")] if isinstance(value, str) else value
    found = [found] if isinstance(found, int) else found
    try:
        if not isinstance(found, (list, tuple)) or any(isinstance(part, (bool, float)) for part in found):
            raise ValueError
        return tuple(int(part) for part in found)
    except (ValueError, TypeError):
        raise HparamError(f"{where}: {name} must be whole numbers such as 4,5,6, got {value!r}") from None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
