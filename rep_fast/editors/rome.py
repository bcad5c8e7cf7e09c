"""ROME and R-ROME: one fact, one layer, a rank-one update in closed form (methods §5.1, §5.2).

With C the second moment of keys, k̄ the key averaged over prefixes, k_0 the key of the bare prompt, u = C⁻¹k̄:

  ROME    W' = W + (v* − W k_0 − b) uᵀ / (k_0ᵀu)      so that W'k_0 + b = v*
  R-ROME  W' = W + (v* − m̄) uᵀ / (k̄ᵀu)               so that W'k̄ + b = v*, m̄ the MLP output averaged like k̄

Among all updates that meet the constraint this one disturbs the corpus least (it minimises tr(ΔW C ΔWᵀ)). For any key
k the update adds residual·(kᵀu)/(denominator): the transfer law on which REP and the collision scan rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rep_fast.editors.corpus_moments import checked_moments
from rep_fast.editors.value import OptimisedValue, ValueHparams, optimise_value
from rep_fast.edits import Edit, LowRank, ModuleEdit
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM
from rep_fast.presets import flat_mapping
from rep_fast.stats import SecondMoments

KEY_CHOICES = ("rome", "prefix", "prompt", "denominator_only")
# |k_0ᵀu| this far below the response of a typical corpus token blows the update up: the "disabling edit"
DISABLING_SHARE = 1e-3


@dataclass(frozen=True)
class RomeHparams:
    """Hyper-parameters of ROME and R-ROME.

    layer: edited layer, 0-based. keys: "rome" (5.1), "prefix" (R-ROME, 5.2), "prompt" (k_0 everywhere),
    "denominator_only" (residual at k_0, denominator k̄ᵀu). mom2_adjustment: False takes C = I. target_tok,
    fact_token: tokenisation choices (methods §2.3, §2.4). template_style: of `context_templates`.
    """

    layer: int
    keys: str = "rome"
    mom2_adjustment: bool = True
    target_tok: str = "in_context"
    fact_token: str = "subject_last"
    template_style: str = "rome"
    value: ValueHparams = field(default_factory=ValueHparams)

    def __post_init__(self) -> None:
        if self.keys not in KEY_CHOICES:
            raise HparamError(f"keys={self.keys!r} is unknown for ROME; choose from {', '.join(KEY_CHOICES)}")

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layer, as methods of several layers name theirs."""
        return (self.layer,)


@dataclass(frozen=True)
class RankOne:
    """The closed form's ingredients: ΔW = residual · directionᵀ / denominator.

    key: the key whose constraint is met and by which other keys are measured; direction u = C⁻¹k̄ [M]; residual [D].
    """

    key: Tensor
    direction: Tensor
    residual: Tensor
    denominator: Tensor

    def delta(self) -> LowRank:
        """ΔW as a rank-one product."""
        return LowRank(self.residual[:, None], (self.direction / self.denominator)[None])


def closed_form(*, keys: Tensor, values: Tensor, v_star: Tensor, direction: Tensor, choice: str) -> RankOne:
    """The rank-one update.

    Args:
        keys [P, M], values [P, D]: of the prompt behind each template, the bare one first; values are outputs of the
            module and so hold its bias, which cancels in the residual.
        v_star: [D].
        direction: u [M], C⁻¹ times the key that `choice` averages.
        choice: one of `KEY_CHOICES`.
    """
    k_0, k_mean = keys[0], keys.mean(dim=0)
    if choice == "prefix":
        return RankOne(k_mean, direction, v_star - values.mean(dim=0), k_mean @ direction)
    denominator = k_mean @ direction if choice == "denominator_only" else k_0 @ direction
    return RankOne(k_0, direction, v_star - values[0], denominator)


def rome(
    lm: EditableLM,
    facts: Sequence[Fact],
    *,
    moments: SecondMoments | None,
    hparams: RomeHparams,
    templates: Sequence[str],
    method: str = "rome",
) -> Edit:
    """Edit one fact with ROME or, with `keys="prefix"`, R-ROME.

    Args:
        facts: exactly one.
        moments: second moments of this model with `hparams.layer`; None only with mom2_adjustment=False.
        templates: `context_templates` of the model, the bare one first.
    Returns:
        Edit with a rank-one delta. The module's `vectors`: k_star [M] (the key the update was written for), direction
        u [M] (C⁻¹k̄), response u/denominator [M] (ρ(k) = kᵀresponse). `tensors`: v_star, v_0 [D].
    Raises:
        HparamError: not exactly one fact. LayerError: no such layer. FingerprintError: moments of another model.
        NothingToEditError, PromptError, SingularMomentError: see `optimise_value`, `Fact`, `SpdSolver`.
    """
    if len(facts) != 1:
        raise HparamError(f"{method} writes one fact at a time, got {len(facts)}; make one edit each and stack them")
    lm.check_layer(hparams.layer)
    _check_moments(lm, moments, hparams)
    found = optimise_value(
        lm, facts[0], layer=hparams.layer, templates=templates, hparams=hparams.value,
        fact_token=hparams.fact_token, target_tok=hparams.target_tok,
    )  # fmt: skip
    averaged = found.keys[0] if hparams.keys == "prompt" else found.keys.mean(dim=0)
    direction = whitened(averaged, moments, hparams)
    update = closed_form(
        keys=found.keys.double(), values=found.values.double(), v_star=found.v_star.double(), direction=direction,
        choice=hparams.keys,
    )  # fmt: skip
    _warn_if_disabling(update, averaged.double(), facts[0])
    return _as_edit(lm, facts[0], found, update, hparams, templates, method)


def whitened(key: Tensor, moments: SecondMoments | None, hparams: RomeHparams) -> Tensor:
    """u = C⁻¹k in float64 (k itself when C is left out)."""
    if moments is None or not hparams.mom2_adjustment:
        return key.double()
    solver = moments.solver(hparams.layer)
    return solver.solve(key[:, None].to(solver.second_moment.device))[:, 0].to(key.device)


def _check_moments(lm: EditableLM, moments: SecondMoments | None, hparams: RomeHparams) -> None:
    if hparams.mom2_adjustment:
        checked_moments(lm, moments, hparams.layers, or_else=", or set mom2_adjustment=False to take C = I")


def _warn_if_disabling(update: RankOne, averaged: Tensor, fact: Fact) -> None:
    # E[(kᵀu)²] over the corpus is uᵀCu = k̄ᵀu when u = C⁻¹k̄: the typical response has its square root
    typical = (averaged @ update.direction).clamp_min(0).sqrt()
    if bool(update.denominator.abs() < DISABLING_SHARE * typical):
        warnings.warn(
            f"the edit of {fact.text!r} divides by {float(update.denominator):.2e}, far below a typical token's "
            f"{float(typical):.2e}: it may disable the model; use method 'r-rome'",
            stacklevel=3,
        )


def _as_edit(
    lm: EditableLM, fact: Fact, found: OptimisedValue, update: RankOne, hparams: RomeHparams, templates: Sequence[str],
    method: str,
) -> Edit:  # fmt: skip
    dtype = found.v_star.dtype
    delta = update.delta()
    vectors = {
        "k_star": update.key.to(dtype),
        "direction": update.direction.to(dtype),
        "response": (update.direction / update.denominator).to(dtype),
    }
    notes: dict[str, Any] = {
        "templates": list(templates),
        "loss_first": found.losses[0],
        "loss_last": found.losses[-1],
        "v_forwards": len(found.losses),
    }
    return Edit(
        facts=(fact,),
        method=method,
        hparams=flat_mapping(hparams),
        fingerprint=lm.fingerprint,
        modules=(ModuleEdit(hparams.layer, LowRank(delta.left.to(dtype), delta.right.to(dtype)), vectors=vectors),),
        notes=notes,
        tensors={"v_star": found.v_star, "v_0": found.v_0},
        model_name=lm.name,
    )
