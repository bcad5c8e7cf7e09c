"""EMMET: batches under equality constraints, or with a ridge in their place (methods §5.4).

  ΔW = R (Kᵀ(αC)⁻¹K + λ_e I)⁻¹ Kᵀ(αC)⁻¹

which is MEMIT with λ = α·λ_e; at λ_e = 0 every key gets exactly its value. One layer as published; several are allowed
and spread as in MEMIT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rep_fast.editors.batch import BatchHparams, Rule, edit_batch
from rep_fast.editors.corpus_moments import checked_moments, whitening
from rep_fast.edits import Edit
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments

# λ_e of the original for more than one key: without it nearly equal keys blow the update up
BATCH_RIDGE = 0.1


@dataclass(frozen=True)
class EmmetHparams(BatchHparams):
    """Hyper-parameters of EMMET.

    mom2_update_weight: α. emmet_lambda: λ_e, None for 0 with one key and 0.1 with several.
    """

    mom2_update_weight: float = 1.0
    emmet_lambda: float | None = None


def emmet(
    lm: EditableLM,
    facts: Sequence[Fact],
    *,
    moments: SecondMoments | None,
    hparams: EmmetHparams,
    templates: Sequence[str],
    method: str = "emmet",
) -> Edit:
    """Edit facts with EMMET.

    Args:
        moments: second moments of this model with all edited layers.
        templates: `context_templates` of the model, the bare one first.
    Returns, Raises: see `edit_batch`, `checked_moments`, `SpdSolver`.
    """

    def ridge(_: int, n_keys: int) -> float:
        chosen = hparams.emmet_lambda
        if chosen is None:
            chosen = 0.0 if n_keys == 1 else BATCH_RIDGE
        return hparams.mom2_update_weight * chosen

    rule = Rule(metric=whitening(checked_moments(lm, moments, hparams.layers), hparams.factor_precision), ridge=ridge)
    return edit_batch(lm, facts, hparams=hparams, templates=templates, method=method, rule=rule)
