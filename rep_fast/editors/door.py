"""The door to all editors: a name, the hyper-parameters it takes, and the function that edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rep_fast.editors.alphaedit import AlphaEditHparams, alphaedit, find_null_spaces
from rep_fast.editors.corpus_moments import factor_moments
from rep_fast.editors.emmet import EmmetHparams, emmet
from rep_fast.editors.fine_tuning import FineTuningHparams, fine_tune
from rep_fast.editors.grace import GraceHparams, grace
from rep_fast.editors.knowledge_neurons import KnowledgeNeuronsHparams, knowledge_neurons
from rep_fast.editors.lora import LoraHparams, lora
from rep_fast.editors.memit import MemitHparams, memit
from rep_fast.editors.pac import PacHparams, pac
from rep_fast.editors.pmet import PmetHparams, pmet
from rep_fast.editors.rome import RomeHparams, rome
from rep_fast.editors.state import EditorState
from rep_fast.editors.wise import WiseHparams, wise
from rep_fast.edits import Edit
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, context_templates
from rep_fast.presets import Preset, field_names, from_flat_mapping, load_preset
from rep_fast.stats import SecondMoments

Write = Callable[..., Edit]


@dataclass(frozen=True)
class Editor:
    """One method: `hparams(lm, preset)` gives its settings for a model, calling it gives an `Edit`.

    name: at the door. hparams_type: dataclass with `layers`, a tuple (a field, or a property of a single-layer method).
    write: function (lm, facts, *, hparams, method, …) → Edit. takes: what else it is handed, of "moments", "templates",
    "state", "cache_dir" and "seed". is_batch: whether it writes several facts in one edit. has_key: whether an edit of
    one fact is looked up by a key, so that REP can be trained on it. prepare: makes what all edits with the same
    moments and hyper-parameters share.
    """

    name: str
    hparams_type: type
    write: Write
    takes: frozenset[str] = frozenset({"moments", "templates"})
    is_batch: bool = False
    has_key: bool = False
    prepare: Callable[[SecondMoments, Any, str | Path | None], None] = factor_moments

    def hparams(
        self, lm: EditableLM, *, preset: str | Preset = "default", overrides: Mapping[str, Any] | None = None
    ) -> Any:
        """The preset's hyper-parameters for this model's family, changed by `overrides` (flat names, "v_steps").

        "layer" and "layers" stand for each other, so that one override serves methods of one and of several layers.

        Raises:
            HparamError: unknown preset or name, value of the wrong type. LayerError: layer outside the model.
        """
        chosen = load_preset(preset) if isinstance(preset, str) else preset
        values = {**chosen.section(self.name, family=lm.family), **self._named_layers(overrides or {})}
        made = from_flat_mapping(self.hparams_type, values, where=f"{self.name} (preset {chosen.name})")
        for layer in made.layers:
            lm.check_layer(layer)
        return made

    def check_facts(self, facts: Sequence[Fact]) -> None:
        """Raise HparamError when this method does not write that many facts in one edit."""
        if not self.is_batch and len(facts) != 1:
            raise HparamError(
                f"{self.name} writes one fact at a time, got {len(facts)}; make one edit each and stack them"
            )
        if not facts:
            raise HparamError(f"{self.name} needs at least one fact, got none")

    def __call__(
        self,
        lm: EditableLM,
        facts: Sequence[Fact],
        *,
        moments: SecondMoments | None = None,
        hparams: Any = None,
        templates: Sequence[str] | None = None,
        state: EditorState | None = None,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> Edit:
        """Edit; what the method does not take is left out.

        Args:
            templates: not given, they are sampled with `seed` and kept in `cache_dir`, see `context_templates`.
            state: `EditorState` of earlier edits, for methods that keep past keys; None: there are none.
        """
        self.check_facts(facts)
        hparams = self.hparams(lm) if hparams is None else hparams
        if templates is None and "templates" in self.takes:
            templates = context_templates(lm, style=hparams.template_style, seed=seed, cache_dir=cache_dir)
        shared = {"moments": moments, "templates": templates, "state": state, "cache_dir": cache_dir, "seed": seed}
        handed = {name: value for name, value in shared.items() if name in self.takes}
        return self.write(lm, facts, hparams=hparams, method=self.name, **handed)

    def _named_layers(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        known, renamed = field_names(self.hparams_type), dict(overrides)
        if "layer" in renamed and "layers" in known:
            renamed["layers"] = renamed.pop("layer")
        if "layers" in renamed and "layer" in known and "layers" not in known:
            layers = renamed.pop("layers")
            if isinstance(layers, (list, tuple)):
                if len(layers) != 1:
                    raise HparamError(f"{self.name} edits one layer, got {list(layers)}; name one")
                layers = layers[0]
            renamed["layer"] = layers
        return renamed


FINE_TUNING = ("ft", "ft-l", "ft-c", "ft-m")

_MOMENTS_AND_STATE = frozenset({"moments", "templates", "state"})
_EDITORS = {
    editor.name: editor
    for editor in (
        Editor("rome", RomeHparams, rome, has_key=True),
        Editor("r-rome", RomeHparams, rome, has_key=True),
        Editor("grace", GraceHparams, grace, takes=frozenset({"seed"}), is_batch=True),
        Editor("wise", WiseHparams, wise, takes=frozenset({"templates", "seed"}), is_batch=True),
        *(Editor(name, FineTuningHparams, fine_tune, frozenset(), is_batch=True) for name in FINE_TUNING),
        Editor("lora", LoraHparams, lora, frozenset({"seed"}), is_batch=True),
        Editor("kn", KnowledgeNeuronsHparams, knowledge_neurons, frozenset({"templates"})),
        Editor("pac", PacHparams, pac, frozenset({"seed"}), is_batch=True),
        Editor("memit", MemitHparams, memit, takes=_MOMENTS_AND_STATE, is_batch=True, has_key=True),
        Editor("memit-cache", MemitHparams, memit, takes=_MOMENTS_AND_STATE, is_batch=True, has_key=True),
        Editor("emmet", EmmetHparams, emmet, is_batch=True, has_key=True),
        Editor("pmet", PmetHparams, pmet, is_batch=True, has_key=True),
        Editor(
            "alphaedit",
            AlphaEditHparams,
            alphaedit,
            takes=_MOMENTS_AND_STATE | {"cache_dir"},
            is_batch=True,
            has_key=True,
            prepare=find_null_spaces,
        ),
    )
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
