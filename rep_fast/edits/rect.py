"""RECT: of an update only the entries that change their weight most, in proportion (methods §5.12).

Keeps the share of entries with the largest |ΔW_ij / W_ij| and puts the others to zero. Dense by nature.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rep_fast.edits.applying import check_fits
from rep_fast.edits.dense import Dense
from rep_fast.edits.edit import Edit, past_keys_of
from rep_fast.edits.prune import check_clean
from rep_fast.errors import HparamError

if TYPE_CHECKING:
    from rep_fast.models import EditableLM


def rect(edit: Edit, lm: EditableLM, *, share: float = 0.2, epsilon: float = 0.0) -> Edit:
    """The edit with only the relatively largest entries of its deltas.

    Args:
        lm: the clean model.
        share: of all entries of a module that stay, above 0 up to 1.
        epsilon: added to W; the AlphaEdit study takes 1e-8 and a share of 0.4.
    Returns:
        Edit with dense deltas, equal to the given ones bit for bit where kept and zero elsewhere; without `vectors`,
        which described the update as it was.
    Raises:
        HparamError: share out of range, or edits are active in the model.
    Cost: one selection among the D·M entries per module, no sort.
    """
    if not 0.0 < share <= 1.0:
        raise HparamError(f"share={share} of RECT is out of range; keep a share above 0 and up to 1")
    check_clean(lm, "RECT")
    check_fits(lm, edit)
    modules = []
    for module in edit.modules:
        if module.delta is None:
            modules.append(module)
            continue
        change = module.delta.to_dense()
        weight = lm.linear_weight(*module.place).detach().to(change)
        kept = torch.where(relatively_largest(change, weight + epsilon, share=share), change, 0.0)
        modules.append(replace(module, delta=Dense(kept), vectors=past_keys_of(module)))
    notes: dict[str, Any] = {**edit.notes, "rect": {"share": share, "epsilon": epsilon}}
    return replace(edit, modules=tuple(modules), notes=notes)


def relatively_largest(change: Tensor, weight: Tensor, *, share: float) -> Tensor:
    """Bool mask of the round(share · n) entries with the largest |change / weight|, one at least.

    A change of a zero weight counts as infinite, no change as zero; which of equal entries stay is left open.
    """
    ratio = torch.where(change == 0, 0.0, (change / weight).abs()).flatten()
    count = max(1, round(share * ratio.numel()))
    chosen = ratio.topk(count, sorted=False).indices
    return torch.zeros_like(ratio, dtype=torch.bool).index_fill(0, chosen, True).view_as(change)
