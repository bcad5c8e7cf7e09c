"""PMET: MEMIT's update for MLP outputs that were optimised together with the attention's (methods §5.5).

The attention takes up what is not about the fact, so that the MLP's vector, the only one written, says the fact alone.
The missing residual is spread by roots, which gives the first layers more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rep_fast.editors.batch import BatchHparams, Rule, edit_batch
from rep_fast.editors.corpus_moments import checked_moments, whitening
from rep_fast.editors.memit import update_weight
from rep_fast.editors.value import ATTENTION_AND_VALUE
from rep_fast.edits import Edit
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments


@dataclass(frozen=True)
class PmetHparams(BatchHparams):
    """Hyper-parameters of PMET. mom2_update_weight: λ, None as in MEMIT."""

    mom2_update_weight: float | None = None


def pmet(
    lm: EditableLM,
    facts: Sequence[Fact],
    *,
    moments: SecondMoments | None,
    hparams: PmetHparams,
    templates: Sequence[str],
    method: str = "pmet",
) -> Edit:
    """Edit facts with PMET.

    Args:
        moments: second moments of this model with all edited layers.
        templates: `context_templates` of the model, the bare one first.
    Returns, Raises: see `edit_batch`, `checked_moments`, `SpdSolver`.
    """
    rule = Rule(
        metric=whitening(checked_moments(lm, moments, hparams.layers), hparams.factor_precision),
        ridge=lambda layer, _: update_weight(lm, layer, hparams.mom2_update_weight),
        sites=ATTENTION_AND_VALUE,
        root=True,
    )
    return edit_batch(lm, facts, hparams=hparams, templates=templates, method=method, rule=rule)
