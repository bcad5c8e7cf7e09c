"""The second moments an editor is handed: whether they serve, and the metric they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rep_fast.errors import HparamError
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments

# of C⁻¹k, relative: what enters ΔW, whose error is of the same order
WHITENING_ERROR = 1e-10


def checked_moments(
    lm: EditableLM, moments: SecondMoments | None, layers: Sequence[int], *, or_else: str = ""
) -> SecondMoments:
    """The moments, when they serve.

    Args:
        or_else: another way out than collecting them, for the message.
    Raises:
        HparamError: there are none, or a layer is missing. FingerprintError: they are of another model.
    """
    if moments is None:
        raise HparamError(f"this edit needs second moments; collect them{or_else}")
    moments.check_model(lm)
    missing = [layer for layer in layers if layer not in moments.layers]
    if missing:
        held = ", ".join(map(str, moments.layers))
        raise HparamError(
            f"the second moments hold layers {held}, not {', '.join(map(str, missing))}; collect them for all of them"
        )
    return moments


def factor_moments(moments: SecondMoments, hparams: Any, cache_dir: str | Path | None) -> None:
    """Factor C of every edited layer, which all later solves share."""
    for layer in hparams.layers:
        moments.solver(layer, precision=getattr(hparams, "factor_precision", "auto"))


def whitening(moments: SecondMoments, precision: str) -> Callable[[int, Tensor], Tensor]:
    """The metric C⁻¹: (layer, A [M, a]) → C⁻¹A [M, a] float64, where C was factored, in that precision."""

    def whiten(layer: int, columns: Tensor) -> Tensor:
        solver = moments.solver(layer, precision=precision)
        return solver.solve(columns.to(solver.second_moment.device), forward_error=WHITENING_ERROR)

    return whiten
