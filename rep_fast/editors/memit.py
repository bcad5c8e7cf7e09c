"""MEMIT, and MEMIT with past keys: many facts, several layers (methods §5.3, §5.7).

  ΔW = R Kᵀ (λC + KKᵀ + K_past K_pastᵀ)⁻¹

λ weighs the corpus against the facts: of one residual the share β/(β + λ) is written, β = kᵀC⁻¹k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rep_fast.editors.batch import BatchHparams, Rule, edit_batch
from rep_fast.editors.corpus_moments import checked_moments, whitening
from rep_fast.editors.state import EditorState
from rep_fast.edits import Edit
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments

# λ by key width, where one was published: LLaMA2-7B; Mistral-7B, Llama3-8B; Qwen2-7B; GPT-J; GPT2-XL (methods §4)
PUBLISHED_WEIGHTS = {11008: 15000.0, 14336: 15000.0, 18944: 15000.0, 16384: 15000.0, 6400: 20000.0}
# of M, for other widths: the mean of β over the tokens of C is M, and 15000 is 1.4·M on LLaMA2
WEIGHT_PER_WIDTH = 1.4


@dataclass(frozen=True)
class MemitHparams(BatchHparams):
    """Hyper-parameters of MEMIT.

    mom2_update_weight: λ, None for the published weight of this key width or 1.4·M. past_keys: protect the edits in the
    `EditorState`, and leave this edit's keys for the next.
    """

    mom2_update_weight: float | None = None
    past_keys: bool = False


def memit(
    lm: EditableLM,
    facts: Sequence[Fact],
    *,
    moments: SecondMoments | None,
    hparams: MemitHparams,
    templates: Sequence[str],
    state: EditorState | None = None,
    method: str = "memit",
) -> Edit:
    """Edit facts with MEMIT.

    Args:
        moments: second moments of this model with all edited layers.
        templates: `context_templates` of the model, the bare one first.
        state: past keys, used with `hparams.past_keys` alone.
    Returns, Raises: see `edit_batch`, `checked_moments`, `SpdSolver`.
    """
    rule = Rule(
        metric=whitening(checked_moments(lm, moments, hparams.layers), hparams.factor_precision),
        ridge=lambda layer, _: update_weight(lm, layer, hparams.mom2_update_weight),
        remembers=hparams.past_keys,
    )
    return edit_batch(
        lm, facts, hparams=hparams, templates=templates, method=method, rule=rule,
        state=state if hparams.past_keys else None,
    )  # fmt: skip


def update_weight(lm: EditableLM, layer: int, given: float | None) -> float:
    """λ: the one given, else the published one of this key width, else 1.4·M."""
    if given is not None:
        return given
    width = lm.key_width(layer)
    return PUBLISHED_WEIGHTS.get(width, WEIGHT_PER_WIDTH * width)
