"""Edits that become part of the model's weights for good."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rep_fast.edits.applying import check_fits, check_mergeable
from rep_fast.edits.edit import Edit
from rep_fast.errors import HparamError

if TYPE_CHECKING:
    from rep_fast.models import EditableLM


def merge_into(edit: Edit, lm: EditableLM) -> None:
    """Write an edit into the weights; see `Edit.merge_into`."""
    if lm.active_edits:
        raise HparamError(
            f"{len(lm.active_edits)} edits are active in {lm.name}, and undoing them would restore the weights; undo "
            "them before merging one for good"
        )
    check_fits(lm, edit)
    check_mergeable(edit)
    check_lasting(edit, "a weight", "apply the edit, or take them out with edit.with_adapters({layer: ()})")
    changes = [(lm.linear_weight(*module.place), module.delta) for module in edit.modules if module.delta is not None]
    with torch.no_grad():
        for weight, delta in changes:
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(wide) + delta.to(device=weight.device, dtype=wide).to_dense())
    lm.forget_fingerprint()


def check_lasting(edit: Edit, form: str, remedy: str) -> None:
    """Refuse key adapters, which act on activations.

    Raises:
        HparamError: the edit has some; `form` says what cannot hold them.
    """
    layers = [module.layer for module in edit.modules if module.adapters]
    if layers:
        raise HparamError(
            f"the edit carries key adapters at layers {layers}, whose gates decide token by token, which {form} cannot "
            f"hold; {remedy}"
        )
