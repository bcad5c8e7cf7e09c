"""The door to all editors: a name, the hyper-parameters it takes, and the function that edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rep_fast.editors.rome import RomeHparams, rome
from rep_fast.edits import Edit
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, context_templates
from rep_fast.presets import Preset, from_flat_mapping, load_preset
from rep_fast.stats import SecondMoments

Write = Callable[..., Edit]


@dataclass(frozen=True)
class Editor:
    """One method: `hparams(lm, preset)` gives its settings for a model, calling it gives an `Edit`."""

    name: str
    hparams_type: type
    write: Write

    def hparams(
        self, lm: EditableLM, *, preset: str | Preset = "default", overrides: Mapping[str, Any] | None = None
    ) -> Any:
        """The preset's hyper-parameters for this model's family, changed by `overrides` (flat names, "v_steps").

        Raises:
            HparamError: unknown preset or name, value of the wrong type. LayerError: layer outside the model.
        """
        chosen = load_preset(preset) if isinstance(preset, str) else preset
        values = {**chosen.section(self.name, family=lm.family), **(overrides or {})}
        made = from_flat_mapping(self.hparams_type, values, where=f"{self.name} (preset {chosen.name})")
        lm.check_layer(made.layer)
        return made

    def __call__(
        self,
        lm: EditableLM,
        facts: Sequence[Fact],
        *,
        moments: SecondMoments | None = None,
        hparams: Any = None,
        templates: Sequence[str] | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> Edit:
        """Edit; templates not given are sampled with `seed` and kept in `cache_dir`, see `context_templates`."""
        hparams = self.hparams(lm) if hparams is None else hparams
        if templates is None:
            templates = context_templates(lm, style=hparams.template_style, seed=seed, cache_dir=cache_dir)
        return self.write(lm, facts, moments=moments, hparams=hparams, templates=templates, method=self.name)


_EDITORS = {
    "rome": Editor("rome", RomeHparams, rome),
    "r-rome": Editor("r-rome", RomeHparams, rome),
}


def names() -> tuple[str, ...]:
    """Names that `get` knows."""
    return tuple(_EDITORS)


def get(name: str) -> Editor:
    """The editor of that name.

    Raises:
        HparamError: no such method.
    """
    if name not in _EDITORS:
        raise HparamError(f"method {name!r} is unknown; choose from {', '.join(_EDITORS)}")
    return _EDITORS[name]
