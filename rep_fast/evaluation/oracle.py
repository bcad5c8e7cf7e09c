"""The ceiling of key-side methods: the value an editor wanted, forced where the subject ends (methods §17).

A method that moves keys can at best make the edited layer return v* at the subject's last token. Doing exactly that to
the unedited model shows how much of what is missing is lookup, and how much the value itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from rep_fast.edits import Edit
from rep_fast.errors import HparamError
from rep_fast.models import EditableLM, Site


@contextmanager
def oracle_patch(lm: EditableLM, edit: Edit, positions: Sequence[int | None]) -> Iterator[None]:
    """Force the MLP output at the edited layer to v* in each row's token `positions[row]` (None: row untouched).

    Raises:
        HparamError: the edit carries no v* of an MLP output.
    """
    layer, v_star = wanted_value(edit)
    rows = torch.tensor([row for row, position in enumerate(positions) if position is not None], dtype=torch.int64)
    tokens = torch.tensor([position for position in positions if position is not None], dtype=torch.int64)

    def force(output: torch.Tensor) -> torch.Tensor:
        forced = output.clone()
        forced[rows.to(output.device), tokens.to(output.device)] = v_star.to(output)
        return forced

    with lm.patch(Site("value", layer), force):
        yield


def wanted_value(edit: Edit) -> tuple[int, torch.Tensor]:
    """Layer and v* [D] of an edit that wrote an MLP output at one layer.

    Raises:
        HparamError: the edit touches several layers or carries no `v_star`.
    """
    layers = [module.layer for module in edit.modules]
    v_star = edit.tensors.get("v_star")
    if len(layers) != 1 or v_star is None or v_star.squeeze().dim() != 1:
        raise HparamError(
            f"an edit by {edit.method!r} at layers {layers} carries no single MLP output v*; "
            "take the ceiling of a column made by rome or r-rome"
        )
    return layers[0], v_star.squeeze()
