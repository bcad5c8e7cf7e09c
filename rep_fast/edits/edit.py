"""An edit: what an editor returns and everything else takes. It knows its facts, its model and how to come and go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rep_fast.edits.applying import AppliedEdit, Compose, Mode, apply_edit
from rep_fast.edits.delta import Delta
from rep_fast.edits.key_adapter import KeyAdapter
from rep_fast.edits.replacement import Replacement
from rep_fast.errors import LayerError
from rep_fast.facts import Fact

if TYPE_CHECKING:
    from rep_fast.models import EditableLM


# name among a module's vectors: keys [n, M] that later edits must leave alone
PAST_KEYS = "past_keys"


@dataclass(frozen=True, eq=False)
class ModuleEdit:
    """What an edit does at one linear module of a layer: adapters on its input, then the delta, then the replacement.

    Args:
        layer: 0-based.
        delta: change of the weight, None for adapters only.
        adapters: in the order they apply; they act on keys, so only the down-projection takes them.
        linear: name of the module, see `EditableLM.linears`.
        vectors: what others need to know of this module's update, saved with the edit: k_star [M], the key it was
            written for, direction C⁻¹k*, response with ρ(k) = k·response, past keys of stateful editors …
        replacement: what replaces the module's output for some prompts; None for most editors.
    Raises:
        LayerError: adapters at another module than the down-projection.
    """

    layer: int
    delta: Delta | None = None
    adapters: tuple[KeyAdapter, ...] = ()
    linear: str = "down"
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    replacement: Replacement | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))
        if self.adapters and self.linear != "down":
            raise LayerError(f"key adapters act before the down-projection, not before {self.linear!r}")

    @property
    def place(self) -> tuple[int, str]:
        """(layer, linear)."""
        return self.layer, self.linear


def past_keys_of(module: ModuleEdit) -> dict[str, Tensor]:
    """Those of a module's vectors that hold for whatever becomes of its update: the past keys."""
    return {name: vector for name, vector in module.vectors.items() if name == PAST_KEYS}


@dataclass(frozen=True, eq=False)
class Edit:
    """A finished edit of one model.

    Args:
        facts: what was written.
        method: name of the editor.
        hparams: its hyper-parameters; JSON values only.
        fingerprint: of the model it was made for; no other model takes it.
        modules: one entry per edited linear module.
        notes: anything the editor reports; JSON values only.
        tensors: what belongs to no single module (v_star, v_0 …), saved with the edit.
        model_name: name of that model, for messages.
    Raises:
        LayerError: two entries for one module.
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
        if len({module.place for module in self.modules}) != len(self.modules):
            places = [f"{module.linear} of {module.layer}" for module in self.modules]
            raise LayerError(f"an edit has one entry per module, got {', '.join(places)}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, each once, in the order of `modules`."""
        return tuple(dict.fromkeys(module.layer for module in self.modules))

    def module(self, layer: int, linear: str = "down") -> ModuleEdit:
        """The entry of one module.

        Raises:
            LayerError: the edit does not touch it.
        """
        for module in self.modules:
            if module.place == (layer, linear):
                return module
        raise LayerError(f"this edit changes layers {list(self.layers)}, not {linear} of {layer}")

    def apply(self, lm: EditableLM, mode: Mode = "hook", *, compose: Compose = "chain") -> AppliedEdit:
        """Make the edit active in the model, on top of other active edits; `.undo()` takes it out again.

        Args:
            mode: "hook" adds the delta's term beside the weight in float32; "merge" writes it into the weight, which a
                replacement does not allow.
            compose: how the adapters of one layer act together (methods §6.5): "chain", each on what the one before
                made of the key, "argmax", the most certain gate alone, or "sum", all on the native key. The same for
                all active edits with adapters there.
        Raises:
            FingerprintError: it was made for another model.
            LayerError: it does not fit the model, or the weight cannot be merged into.
            HparamError: unknown mode or composition, another one than that of an active edit, or a replacement that is
                to be merged or does not go with those that are active.
        """
        return apply_edit(lm, self, mode, compose=compose)

    @contextmanager
    def applied(self, lm: EditableLM, mode: Mode = "hook", *, compose: Compose = "chain") -> Iterator[AppliedEdit]:
        """The edit is active inside the `with` block; see `apply`."""
        handle = self.apply(lm, mode, compose=compose)
        try:
            yield handle
        finally:
            handle.undo()

    def with_adapters(self, adapters: Mapping[int, KeyAdapter | Sequence[KeyAdapter]]) -> Edit:
        """The same edit with these adapters, by layer; layers not named keep theirs.

        Raises:
            LayerError: the edit has no entry for the down-projection of a layer.
        """
        for layer in adapters:
            self.module(layer)

        def adapters_of(module: ModuleEdit) -> tuple[KeyAdapter, ...]:
            if module.linear != "down":
                return ()
            chosen = adapters.get(module.layer, module.adapters)
            return (chosen,) if isinstance(chosen, KeyAdapter) else tuple(chosen)

        return replace(self, modules=tuple(replace(module, adapters=adapters_of(module)) for module in self.modules))

    def merge_into(self, lm: EditableLM) -> None:
        """Write the edit into the model's weights for good, so that `lm.save_pretrained` stores it.

        The model is another one afterwards: its fingerprint changes, and edits and moments made before no longer fit.

        Raises:
            HparamError: edits are active, or this one carries key adapters. FingerprintError: it was made for another
                model. LayerError: it does not fit the model, or the weight is quantised.
        """
        from rep_fast.edits.merging import merge_into

        merge_into(self, lm)

    def export_peft(self, directory: str | Path, lm: EditableLM, *, without_adapters: bool = False) -> None:
        """Write the edit as a LoRA adapter that `peft.PeftModel.from_pretrained` loads: same logits, scale 1.

        Args:
            directory: for `adapter_config.json` and `adapter_model.safetensors`, in float32; made where missing.
            lm: the model, whose modules the files name.
            without_adapters: leave key adapters out, which no LoRA adapter can hold.
        Raises:
            HparamError: the edit carries key adapters, or changes no weight. LayerError: a dense delta.
            FingerprintError: it was made for another model. OutputError: the files cannot be written.
        """
        from rep_fast.edits.export import export_peft

        export_peft(self, directory, lm, without_adapters=without_adapters)

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
