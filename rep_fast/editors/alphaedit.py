"""AlphaEdit: batches written into directions that the corpus does not use (methods §5.6).

  ΔWᵀ = (P(KKᵀ + K_past K_pastᵀ) + L2·I)⁻¹ PK Rᵀ

with P the projector onto the eigenvectors of C whose eigenvalue is small: what the corpus reads stays as it was, and
so, nearly, does what earlier edits wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rep_fast.editors.batch import BatchHparams, Rule, edit_batch
from rep_fast.editors.corpus_moments import checked_moments
from rep_fast.editors.state import EditorState
from rep_fast.edits import Edit
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments
from rep_fast.stats.null_space import NullSpace


@dataclass(frozen=True)
class AlphaEditHparams(BatchHparams):
    """Hyper-parameters of AlphaEdit.

    nullspace_threshold: τ_0, eigenvalues of C below it count as unused; absolute, so it carries the scale of C.
    null_share: instead of it, the share of directions with the smallest eigenvalues. l2: L2, of the scale of k kᵀ.
    """

    nullspace_threshold: float | None = 0.02
    null_share: float | None = None
    l2: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l2 <= 0:
            raise HparamError(f"l2={self.l2} must be positive: keys without a part in the null space divide by it")


def alphaedit(
    lm: EditableLM,
    facts: Sequence[Fact],
    *,
    moments: SecondMoments | None,
    hparams: AlphaEditHparams,
    templates: Sequence[str],
    state: EditorState | None = None,
    cache_dir: str | Path | None = None,
    method: str = "alphaedit",
) -> Edit:
    """Edit facts with AlphaEdit.

    Args:
        moments: second moments of this model with all edited layers.
        templates: `context_templates` of the model, the bare one first.
        state: keys of earlier edits; this edit's own are in its modules' vectors.
        cache_dir: where null-space bases are kept, see `SecondMoments.null_space`.
    Returns, Raises: see `edit_batch`, `checked_moments`, `SecondMoments.null_space`.
    """
    held = checked_moments(lm, moments, hparams.layers)

    def project(layer: int, columns: Tensor) -> Tensor:
        space = null_space(held, layer, hparams, cache_dir)
        return space.project(columns.to(space.basis.device))

    rule = Rule(metric=project, ridge=lambda _, __: hparams.l2, remembers=True)
    return edit_batch(lm, facts, hparams=hparams, templates=templates, method=method, rule=rule, state=state)


def null_space(
    moments: SecondMoments, layer: int, hparams: AlphaEditHparams, cache_dir: str | Path | None
) -> NullSpace:
    """The null space these settings choose."""
    return moments.null_space(
        layer, threshold=hparams.nullspace_threshold, share=hparams.null_share, cache_dir=cache_dir
    )


def find_null_spaces(moments: SecondMoments, hparams: AlphaEditHparams, cache_dir: str | Path | None) -> None:
    """Find the null space of every edited layer, the dearest step of this method, once."""
    for layer in hparams.layers:
        null_space(moments, layer, hparams, cache_dir)
