"""Putting edits into a model and taking them out again, in any order, without a trace.

The ledger is `lm.active_edits`: the handles of all active edits in the order they were applied. After each change the
modules it touches are rebuilt from the ledger and the clean weight, so what a module holds depends on the active edits
alone and not on what was applied and undone before.

hook: W k̂ + b + Δ k̂ with the delta's term in float32 (float64 for float64 models), whatever the weight's dtype.
merge: Δ is added into the weight; a clean copy is kept while any merged edit is active. Adapters always run by hook.

Replacements come last, on what the weight and all deltas make, in the order of the first active edit of each kind;
those of one kind act as one (`Replacement.stacked`). They always run by hook, and are refused in mode "merge".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rep_fast.edits.delta import Delta
from rep_fast.edits.dense import Dense
from rep_fast.edits.key_adapter import KeyAdapter, adapted
from rep_fast.edits.low_rank import LowRank
from rep_fast.edits.replacement import Replacement
from rep_fast.edits.slices import Slices
from rep_fast.errors import FingerprintError, HparamError, LayerError
from rep_fast.ops.gated_adapter import COMPOSITIONS

if TYPE_CHECKING:
    from rep_fast.edits.edit import Edit, ModuleEdit
    from rep_fast.models import EditableLM

Mode = Literal["hook", "merge"]
Compose = Literal["chain", "argmax", "sum"]
Place = tuple[int, str]  # layer, name of the linear module
MODES = ("hook", "merge")


class AppliedEdit:
    """An edit that is active in a model; `undo()` or leaving the `with` block takes it out."""

    def __init__(
        self, lm: EditableLM, edit: Edit, mode: Mode, compose: Compose, modules: dict[Place, PatchedModule]
    ) -> None:
        self.edit = edit
        self.mode = mode
        self.compose = compose
        self._lm = lm
        self._modules = modules  # shared by all handles of this model; gone with the last of them

    @property
    def is_active(self) -> bool:
        """Whether the edit acts in the model."""
        return any(handle is self for handle in self._lm.active_edits)

    def undo(self) -> None:
        """Take the edit out; the others stay. Does nothing when it is out already."""
        undo_all([self])

    def __enter__(self) -> AppliedEdit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def undo_all(handles: Sequence[AppliedEdit]) -> None:
    """Take several edits out at once; others stay, and so do bits: as undoing them one by one, in any order.

    Cost: each module they touch is rebuilt once, where n single undos would add up what is left n times.
    """
    active = [handle for handle in handles if handle.is_active]
    for lm in {id(handle._lm): handle._lm for handle in active}.values():
        leaving = {id(handle): handle for handle in active if handle._lm is lm}
        lm.active_edits[:] = [handle for handle in lm.active_edits if id(handle) not in leaving]
        places = [module.place for handle in leaving.values() for module in handle.edit.modules]
        _rebuild(lm, next(iter(leaving.values()))._modules, places)


def apply_edit(lm: EditableLM, edit: Edit, mode: Mode, *, compose: Compose = "chain") -> AppliedEdit:
    """Make `edit` active on top of those that are.

    Raises:
        HparamError: unknown mode or composition, another composition than that of an active edit, or a replacement that
            is to be merged or does not go with those that are active.
        FingerprintError: the edit was made for another model.
        LayerError: a module of the edit does not fit the model, or its weight cannot be merged into.
    """
    if mode not in MODES:
        raise HparamError(f"mode {mode!r} is unknown; use 'hook' or 'merge'")
    check_fits(lm, edit)
    _check_compose(lm, edit, compose)
    if mode == "merge":
        check_mergeable(edit)
    modules: dict[Place, PatchedModule] = lm.active_edits[0]._modules if lm.active_edits else {}
    handle = AppliedEdit(lm, edit, mode, compose, modules)
    lm.active_edits.append(handle)
    try:
        _rebuild(lm, modules, [module.place for module in edit.modules])
    except BaseException:
        handle.undo()
        raise
    return handle


def check_fits(lm: EditableLM, edit: Edit) -> None:
    """Refuse an edit of another model.

    Raises:
        FingerprintError, LayerError: as `apply_edit`.
    """
    if edit.fingerprint != lm.fingerprint:
        raise FingerprintError(
            f"this edit was made for {edit.model_name or 'a model'} ({edit.fingerprint[:12]}…), the model here is "
            f"{lm.name} ({lm.fingerprint[:12]}…); make the edit again for this model"
        )
    for module in edit.modules:
        lm.check_layer(module.layer)
        shape = lm.linear_shape(*module.place)
        for name, change in (("delta", module.delta), ("replacement", module.replacement)):
            if change is not None and change.shape != shape:
                raise LayerError(f"the {name} of layer {module.layer} is {change.shape}, the weight there is {shape}")
        for adapter in module.adapters:
            if adapter.width != shape[1]:
                raise LayerError(f"an adapter of layer {module.layer} takes keys of {adapter.width}, not {shape[1]}")


def active_composition(lm: EditableLM) -> Compose:
    """How the active edits' adapters act together; "chain" while none has any."""
    return next((handle.compose for handle in lm.active_edits if _has_adapters(handle.edit)), "chain")


def _has_adapters(edit: Edit) -> bool:
    return any(module.adapters for module in edit.modules)


def _check_compose(lm: EditableLM, edit: Edit, compose: Compose) -> None:
    if compose not in COMPOSITIONS:
        raise HparamError(f"composition {compose!r} is unknown; use one of {', '.join(COMPOSITIONS)}")
    if not _has_adapters(edit) or not any(_has_adapters(handle.edit) for handle in lm.active_edits):
        return
    if compose != (active := active_composition(lm)):
        raise HparamError(
            f"the active edits compose their adapters by {active!r}; apply this one with the same, not {compose!r}, or "
            "undo them first"
        )


def check_mergeable(edit: Edit) -> None:
    """Refuse replacements, which no weight can hold.

    Raises:
        HparamError: the edit has one.
    """
    for module in edit.modules:
        if module.replacement is not None:
            raise HparamError(
                f"the {module.replacement.kind} of layer {module.layer} decides for each prompt anew, which no weight "
                "can hold; apply this edit with mode 'hook'"
            )


def replacements_at(lm: EditableLM, place: Place) -> list[Replacement]:
    """The active replacements of one module, in the order of their edits."""
    return [
        module.replacement
        for handle in lm.active_edits
        for module in handle.edit.modules
        if module.place == place and module.replacement is not None
    ]


@contextmanager
def without_replacements(lm: EditableLM, place: Place) -> Iterator[None]:
    """Inside, one module gives what its weight, deltas and adapters make: what a further replacement starts from."""
    patched = lm.active_edits[0]._modules.get(place) if lm.active_edits else None
    if patched is None:
        yield
        return
    with patched.resting():
        yield


@contextmanager
def with_native_keys(lm: EditableLM, place: Place) -> Iterator[None]:
    """Inside, no adapter acts at one module; its deltas do."""
    patched = lm.active_edits[0]._modules.get(place) if lm.active_edits else None
    if patched is None:
        yield
        return
    with patched.native():
        yield


class PatchedModule:
    """One linear module with everything the active edits put around and into it."""

    def __init__(self, lm: EditableLM, place: Place) -> None:
        self._lm = lm
        self._place = place
        self._module: nn.Module = lm.linear(*place)
        stored = next(self._module.parameters())
        self._device = stored.device
        self._dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
        self._weight_view: Callable[[], Tensor] = lambda: lm.linear_weight(*place)
        self._clean: Tensor | None = None
        self._adapters: list[KeyAdapter] = []
        self._compose: Compose = "chain"
        self._deltas: list[Delta] = []
        self._replacements: list[Replacement] = []
        self._before: Any = None
        self._after: Any = None

    def hold(
        self,
        adapters: Sequence[KeyAdapter],
        compose: Compose,
        added: Sequence[Delta],
        merged: Sequence[Delta],
        replacements: Sequence[Replacement],
    ) -> None:
        """Carry exactly these adapters, deltas by hook or in the weight, and replacements; with none, be untouched."""
        device, dtype = self._device, self._dtype
        self._replacements = [kind.to(device=device, dtype=dtype) for kind in _stacked(replacements)]
        self._merge(merged)
        self._adapters = [adapter.to(device=device, dtype=dtype) for adapter in adapters]
        self._compose = compose
        self._deltas = _joined([delta.to(device=device, dtype=dtype) for delta in added])
        # a hook that stays is not made anew: it keeps its place among other people's hooks
        if self._adapters and self._before is None:
            self._before = self._module.register_forward_pre_hook(self._adapt)
        acts_after = bool(self._deltas or self._replacements)
        if acts_after and self._after is None:
            self._after = self._module.register_forward_hook(self._change)
        if not self._adapters and self._before is not None:
            self._before = self._before.remove()
        if not acts_after and self._after is not None:
            self._after = self._after.remove()

    def _adapt(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self._adapters:  # inside `native`
            return args
        return (adapted(args[0], self._adapters, compose=self._compose), *args[1:])

    def _change(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        total = output.to(self._dtype)
        for delta in self._deltas:
            total = total + delta.on_rows(args[0])
        if self._replacements:
            total = self._replaced(args[0].to(self._dtype), total)
        return total.to(output.dtype)

    def _replaced(self, inputs: Tensor, output: Tensor) -> Tensor:
        told = self._lm.forward_pass
        for replacement in self._replacements:
            decision = (self._place, replacement.kind)
            if told.begins:
                told.kept[decision] = replacement.decide(inputs, output, told)
            output = replacement.replaced(inputs, output, told.kept[decision], told)
        return output

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Replacements do not act inside."""
        held, self._replacements = self._replacements, []
        try:
            yield
        finally:
            self._replacements = held

    @contextmanager
    def native(self) -> Iterator[None]:
        """Adapters do not act inside."""
        held, self._adapters = self._adapters, []
        try:
            yield
        finally:
            self._adapters = held

    @torch.no_grad()
    def _merge(self, deltas: Sequence[Delta]) -> None:
        if not deltas and self._clean is None:
            return
        # a [outputs, inputs] view also where the weight is stored transposed; a quantised one has none and says so
        weight = self._weight_view().detach()
        if self._clean is None:
            self._clean = weight.clone()
        if not deltas:
            weight.copy_(self._clean)
            self._clean = None
            return
        total = self._clean.to(self._dtype)
        for delta in deltas:
            total = total + delta.to(device=self._device, dtype=self._dtype).to_dense()
        weight.copy_(total)  # in place: the parameter object and tied references stay


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    """The same sum in fewer terms: low-rank deltas stack their factors, slices of one axis unite, matrices add up."""
    low_rank = [delta for delta in deltas if isinstance(delta, LowRank)]
    slices = [delta for delta in deltas if isinstance(delta, Slices)]
    by_axis = [[delta for delta in slices if delta.axis == axis] for axis in ("outputs", "inputs")]
    # a matrix that is being trained changes in place and must be read anew by every forward
    dense = [delta for delta in deltas if isinstance(delta, Dense) and not delta.matrix.requires_grad]
    trained = [delta for delta in deltas if isinstance(delta, Dense) and delta.matrix.requires_grad]
    return [
        *([LowRank.concat(low_rank)] if low_rank else []),
        *(Slices.concat(own) for own in by_axis if own),
        *([Dense.concat(dense)] if dense else []),
        *trained,
    ]


def _stacked(replacements: Sequence[Replacement]) -> list[Replacement]:
    """One replacement per kind, in the order in which the kinds first appear."""
    by_kind: dict[type[Replacement], list[Replacement]] = {}
    for replacement in replacements:
        by_kind.setdefault(type(replacement), []).append(replacement)
    return [kind.stacked(made) for kind, made in by_kind.items()]


def _rebuild(lm: EditableLM, modules: dict[Place, PatchedModule], places: Sequence[Place]) -> None:
    for place in dict.fromkeys(places):
        parts: list[tuple[AppliedEdit, ModuleEdit]] = [
            (handle, module) for handle in lm.active_edits for module in handle.edit.modules if module.place == place
        ]
        if place not in modules:
            modules[place] = PatchedModule(lm, place)
        modules[place].hold(
            adapters=[adapter for _, module in parts for adapter in module.adapters],
            compose=next((handle.compose for handle, module in parts if module.adapters), "chain"),
            added=[module.delta for handle, module in parts if handle.mode == "hook" and module.delta is not None],
            merged=[module.delta for handle, module in parts if handle.mode == "merge" and module.delta is not None],
            replacements=replacements_at(lm, place),
        )
        if not parts:
            del modules[place]
