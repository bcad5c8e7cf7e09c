"""What editors that remember hand from one edit to the next: the keys of what was written before.

MEMIT with past keys and AlphaEdit protect earlier edits by their keys (methods §5.6, §5.7). The references keep the sum
of k kᵀ in a global of the process; here the keys themselves lie in the edits that wrote them, and a state is gathered
from edits, handed over by name, and saved with a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rep_fast.edits import PAST_KEYS, Edit
from rep_fast.errors import CorruptFileError, FingerprintError, LayerError
from rep_fast.models import EditableLM
from rep_fast.tensor_files import load_tensors, save_tensors

KIND = "editor-state"
VERSION = 1


@dataclass(frozen=True, eq=False)
class EditorState:
    """Keys of earlier edits by layer.

    past_keys: layer → [p, M], oldest first. fingerprint, model_name: of the model; empty for the empty state.
    """

    past_keys: Mapping[int, Tensor] = field(default_factory=dict)
    fingerprint: str = ""
    model_name: str = ""

    @classmethod
    def of(cls, edits: Iterable[Edit]) -> EditorState:
        """The state after these edits, in order; edits by methods that do not remember add nothing.

        Raises:
            FingerprintError: they are edits of different models.
        """
        return cls()._with(edits)

    def after(self, edit: Edit) -> EditorState:
        """The state with one more edit.

        Raises:
            FingerprintError: the edit is one of another model.
        """
        return self._with([edit])

    def _with(self, edits: Iterable[Edit]) -> EditorState:
        """Rows are joined once per layer, however many edits bring some."""
        rows = {layer: [keys] for layer, keys in self.past_keys.items()}
        fingerprint, model_name = self.fingerprint, self.model_name
        for edit in edits:
            added = {module.layer: module.vectors[PAST_KEYS] for module in edit.modules if PAST_KEYS in module.vectors}
            if added and rows and edit.fingerprint != fingerprint:
                raise FingerprintError(
                    f"a state of {model_name or 'a model'} ({fingerprint[:12]}…) cannot take an edit of "
                    f"{edit.model_name or 'another'} ({edit.fingerprint[:12]}…); keep one state per model"
                )
            if added:
                fingerprint, model_name = edit.fingerprint, edit.model_name
            for layer, keys in added.items():
                rows.setdefault(layer, []).append(keys)
        joined = {layer: torch.cat([one.to(own[0]) for one in own]) for layer, own in rows.items()}
        return EditorState(joined, fingerprint, model_name)

    def columns(self, layer: int, *, like: Tensor) -> Tensor | None:
        """K_past [M, p] of one layer with dtype and device of `like`, None where there are none."""
        keys = self.past_keys.get(layer)
        return None if keys is None or not len(keys) else keys.T.to(like)

    def check_model(self, lm: EditableLM) -> None:
        """Refuse the state of another model.

        Raises:
            FingerprintError: it belongs to another model. LayerError: a layer or width the model does not have.
        """
        if self.past_keys and self.fingerprint != lm.fingerprint:
            raise FingerprintError(
                f"this editor state belongs to {self.model_name or 'a model'} ({self.fingerprint[:12]}…), the model "
                f"here is {lm.name} ({lm.fingerprint[:12]}…); start with an empty state"
            )
        for layer, keys in self.past_keys.items():
            width = lm.key_width(lm.check_layer(layer))
            if keys.ndim != 2 or keys.shape[1] != width:
                raise LayerError(
                    f"past keys of layer {layer} have shape {tuple(keys.shape)}, the keys there are {width} wide; "
                    "start with an empty state"
                )

    def save(self, path: str | Path) -> None:
        """Store the state as one safetensors file, whole or not at all.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {f"layer.{layer}": keys for layer, keys in self.past_keys.items()}
        description = {"fingerprint": self.fingerprint, "model_name": self.model_name}
        save_tensors(path, tensors, kind=KIND, version=VERSION, description=description)

    @classmethod
    def load(cls, path: str | Path, lm: EditableLM | None = None) -> EditorState:
        """A state from its file; with `lm`, checked to be that model's.

        Raises:
            MissingFileError: there is no such file. CorruptFileError: it is damaged or of another kind.
            FingerprintError, LayerError: it belongs to another model than `lm`.
        """
        description, tensors = load_tensors(path, kind=KIND, version=VERSION)
        try:
            keys = {int(name.removeprefix("layer.")): tensor for name, tensor in tensors.items()}
            state = cls(keys, description["fingerprint"], description["model_name"])
        except (KeyError, ValueError) as error:
            raise CorruptFileError(f"{path} does not describe an editor state ({error}); save it again") from None
        if lm is not None:
            state.check_model(lm)
        return state
