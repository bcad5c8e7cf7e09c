"""An edit: what an editor returns and everything else takes. It knows its facts, its model and how to come and go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rep_fast.edits.applying import AppliedEdit, Mode, apply_edit
from rep_fast.edits.delta import LowRank
from rep_fast.edits.key_adapter import KeyAdapter
from rep_fast.errors import LayerError
from rep_fast.facts import Fact

if TYPE_CHECKING:
    from rep_fast.models import EditableLM


@dataclass(frozen=True, eq=False)
class ModuleEdit:
    """What an edit does at one layer's down-projection: adapters on the key first, then the delta.

    Args:
        layer: 0-based.
        delta: change of the weight, None for adapters only.
        adapters: in the order they apply.
    """

    layer: int
    delta: LowRank | None = None
    adapters: tuple[KeyAdapter, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))


@dataclass(frozen=True, eq=False)
class Edit:
    """A finished edit of one model.

    Args:
        facts: what was written.
        method: name of the editor.
        hparams: its hyper-parameters; JSON values only.
        fingerprint: of the model it was made for; no other model takes it.
        modules: one entry per edited layer.
        notes: anything the editor reports; JSON values only.
        tensors: vectors worth keeping (k_star, v_star …), saved with the edit.
        model_name: name of that model, for messages.
    Raises:
        LayerError: two entries for one layer.
    """

    facts: tuple[Fact, ...]
    method: str
    hparams: Mapping[str, Any]
    fingerprint: str
    modules: tuple[ModuleEdit, ...]
    notes: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    model_name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", tuple(self.facts))
        object.__setattr__(self, "modules", tuple(self.modules))
        if len(set(self.layers)) != len(self.modules):
            raise LayerError(f"an edit has one entry per layer, got layers {list(self.layers)}")

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(module.layer for module in self.modules)

    def module(self, layer: int) -> ModuleEdit:
        """The entry of one layer.

        Raises:
            LayerError: the edit does not touch it.
        """
        for module in self.modules:
            if module.layer == layer:
                return module
        raise LayerError(f"this edit changes layers {list(self.layers)}, not {layer}")

    def apply(self, lm: EditableLM, mode: Mode = "hook") -> AppliedEdit:
        """Make the edit active in the model, on top of other active edits; `.undo()` takes it out again.

        Args:
            mode: "hook" adds the low-rank term beside the weight in float32; "merge" writes it into the weight.
        Raises:
            FingerprintError: it was made for another model.
            LayerError: it does not fit the model, or the weight cannot be merged into.
            HparamError: unknown mode.
        """
        return apply_edit(lm, self, mode)

    @contextmanager
    def applied(self, lm: EditableLM, mode: Mode = "hook") -> Iterator[AppliedEdit]:
        """The edit is active inside the `with` block; see `apply`."""
        handle = self.apply(lm, mode)
        try:
            yield handle
        finally:
            handle.undo()

    def with_adapters(self, adapters: Mapping[int, KeyAdapter | Sequence[KeyAdapter]]) -> Edit:
        """The same edit with these adapters, by layer; layers not named keep theirs.

        Raises:
            LayerError: the edit has no entry for a layer.
        """
        for layer in adapters:
            self.module(layer)

        def adapters_of(module: ModuleEdit) -> tuple[KeyAdapter, ...]:
            chosen = adapters.get(module.layer, module.adapters)
            return (chosen,) if isinstance(chosen, KeyAdapter) else tuple(chosen)

        return replace(self, modules=tuple(replace(module, adapters=adapters_of(module)) for module in self.modules))

    def save(self, path: str | Path) -> None:
        """Store the edit as one safetensors file, whole or not at all.

        Raises:
            OutputError: the file cannot be written, or hparams or notes hold something that JSON does not know.
        """
        from rep_fast.edits.edit_file import save_edit  # edit_file builds Edits, so it imports this module

        save_edit(self, path)

    @classmethod
    def load(cls, path: str | Path, lm: EditableLM | None = None) -> Edit:
        """An edit from its file; with `lm`, checked to be one of that model.

        Raises:
            MissingFileError: there is no such file.
            CorruptFileError: the file is damaged, of another kind, or from a newer rep_fast.
            FingerprintError: the edit belongs to another model than `lm`.
        """
        from rep_fast.edits.edit_file import load_edit

        return load_edit(path, lm)
