"""A stack of edits on disk: a directory of edit files in the order in which they apply.

What a deployed model carries beyond its weights can so be listed, added to and taken back, one edit at a time. Edits
made one after another belong together in this order: each was made on the model that carries those before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rep_fast.edits.applying import AppliedEdit, Compose, Mode, undo_all
from rep_fast.edits.edit import Edit
from rep_fast.errors import CorruptFileError, FingerprintError, HparamError, MissingFileError, OutputError
from rep_fast.safe_files import write_atomically

if TYPE_CHECKING:
    from rep_fast.models import EditableLM

MANIFEST = "stack.json"
UNDONE = "undone"
VERSION = 1


@dataclass(frozen=True)
class EditStack:
    """Edits of one model, in order.

    Args:
        directory: holds the edit files, `stack.json` and, in `undone`, what was taken back.
        fingerprint, model_name: of the model all of them belong to.
        files: names of the edit files, first applied first.
        compose: how adapters of one layer act together, see `Edit.apply`.
    """

    directory: Path
    fingerprint: str
    model_name: str
    files: tuple[str, ...]
    compose: Compose = "chain"

    @classmethod
    def create(cls, directory: str | Path, first: Edit, *, compose: Compose = "chain") -> EditStack:
        """A new stack with one edit.

        Raises:
            OutputError: the directory holds a stack already, or cannot be written.
        """
        directory = Path(directory)
        if (directory / MANIFEST).exists():
            raise OutputError(f"{directory} holds a stack of edits already; push onto it, or choose another directory")
        empty = cls(directory, first.fingerprint, first.model_name, (), compose)
        return empty.push(first)

    @classmethod
    def open(cls, directory: str | Path) -> EditStack:
        """The stack in a directory.

        Raises:
            MissingFileError: there is none, or one of its files is gone.
            CorruptFileError: its manifest is damaged or from a newer rep_fast.
        """
        directory = Path(directory)
        try:
            found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            if found["version"] > VERSION:
                raise CorruptFileError(
                    f"{directory} is a stack of format version {found['version']}, this rep_fast reads up to "
                    f"{VERSION}; update rep_fast"
                )
            files = tuple(_plain_name(name) for name in found["edits"])
            stack = cls(directory, found["fingerprint"], found["model_name"], files, found["compose"])
        except FileNotFoundError:
            raise MissingFileError(f"there is no stack of edits in {directory}; make one by pushing an edit") from None
        except (KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, CorruptFileError):
                raise
            raise CorruptFileError(f"{directory / MANIFEST} is damaged ({error}); restore it or stack anew") from None
        for name in files:
            if not (directory / name).is_file():
                raise MissingFileError(f"{directory} lists the edit {name}, which is not there; restore the file")
        return stack

    def __len__(self) -> int:
        return len(self.files)

    def edits(self, lm: EditableLM | None = None) -> list[Edit]:
        """All edits, in order; with `lm`, checked to be edits of that model.

        Raises:
            CorruptFileError, FingerprintError: see `Edit.load`.
        """
        return [Edit.load(self.directory / name, lm) for name in self.files]

    def push(self, edit: Edit) -> EditStack:
        """The stack with one more edit, which applies last; on disk when this returns.

        Raises:
            FingerprintError: the edit belongs to another model. OutputError: it cannot be written.
        """
        if edit.fingerprint != self.fingerprint:
            raise FingerprintError(
                f"this edit was made for {edit.model_name or 'another model'} ({edit.fingerprint[:12]}…), the stack is "
                f"of {self.model_name} ({self.fingerprint[:12]}…); make a stack of its own for it"
            )
        name = self._new_name(edit)
        edit.save(self.directory / name)
        return self._written((*self.files, name))

    def undo(self, number: int | None = None) -> tuple[EditStack, Path]:
        """The stack without edit `number` (1 is the first; None the last), and where its file was moved.

        Raises:
            HparamError: the stack has no such edit.
        """
        number = len(self.files) if number is None else number
        if not 1 <= number <= len(self.files):
            raise HparamError(f"the stack in {self.directory} has {len(self.files)} edits; there is no number {number}")
        name = self.files[number - 1]
        # first out of the list, then out of the way: an interruption in between leaves a file nobody lists
        shorter = self._written((*self.files[: number - 1], *self.files[number:]))
        moved = self.directory / UNDONE / name
        try:
            moved.parent.mkdir(exist_ok=True)
            (self.directory / name).replace(moved)
        except OSError as error:
            raise OutputError(
                f"cannot move {name} to {moved.parent} ({error.strerror}); it is off the stack"
            ) from error
        return shorter, moved

    @contextmanager
    def applied(self, lm: EditableLM, mode: Mode = "hook") -> Iterator[list[AppliedEdit]]:
        """All edits are active inside the `with` block, in order."""
        handles: list[AppliedEdit] = []
        try:
            for edit in self.edits(lm):
                handles.append(edit.apply(lm, mode, compose=self.compose))
            yield handles
        finally:
            undo_all(handles)

    def _new_name(self, edit: Edit) -> str:
        taken = [*self.files, *(path.name for path in self.directory.glob("*/*.safetensors"))]
        number = 1 + max((int(match[0]) for name in taken if (match := re.match(r"\d+", name))), default=0)
        subject = edit.facts[0].subject if edit.facts else "none"
        label = re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")[:30] or "edit"
        return f"{number:04d}-{edit.method}-{label}.safetensors"

    def _written(self, files: Sequence[str]) -> EditStack:
        changed = replace(self, files=tuple(files))
        manifest: dict[str, Any] = {
            "version": VERSION,
            "model_name": self.model_name,
            "fingerprint": self.fingerprint,
            "compose": self.compose,
            "edits": list(files),
        }
        write_atomically(self.directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        return changed


def _plain_name(name: str) -> str:
    """A manifest names files beside it and never a path that leads elsewhere."""
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} is no file name")
    return name
