"""Fine-tuning: Adam on the down-projections of a few layers (methods §5.8).

  FT      every target token scored at the prompt's last token ("prompt_last")
  FT-L    the same, every entry held within W_0 ± norm_constraint after each update; FT-C is another name for it
  FT-M    ordinary teacher forcing on the target's tokens ("target_new")

What is trained is ΔW in float32 (float64 for float64 models) beside the weight, so the model itself is never touched.
Exact saving: everything up to the lowest edited layer is constant in ΔW and runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.editors.adam import Adam, Step
from rep_fast.editors.answered import are_answered, nothing_to_edit
from rep_fast.editors.course import Course
from rep_fast.editors.target_loss import Objective, TargetLoss
from rep_fast.edits import Dense, Edit, ModuleEdit
from rep_fast.errors import HparamError
from rep_fast.facts import Fact
from rep_fast.models import EditableLM, Site, SuffixState
from rep_fast.presets import flat_mapping

# below it a batch is left alone, and training ends when the mean of a pass over all facts is
LOSS_FLOOR = 0.01


@dataclass(frozen=True)
class FineTuningHparams:
    """Hyper-parameters of FT, FT-L, FT-C and FT-M.

    layers: whose down-projections are trained. ft_objective: "prompt_last" or "target_new". ft_steps: passes over all
    facts; ft_batch: facts per update. norm_constraint: largest change of an entry, None: no limit. target_tok:
    tokenisation of targets (methods §2.4).
    """

    layers: tuple[int, ...]
    ft_objective: Objective = "prompt_last"
    ft_steps: int = 25
    ft_lr: float = 5e-4
    ft_batch: int = 1
    norm_constraint: float | None = None
    target_tok: str = "in_context"

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise HparamError(f"layers={list(self.layers)} must name at least one layer, and each once")
        for name in ("ft_steps", "ft_lr", "ft_batch"):
            if getattr(self, name) <= 0:
                raise HparamError(f"{name}={getattr(self, name)} must be positive")
        if self.norm_constraint is not None and self.norm_constraint <= 0:
            raise HparamError(f"norm_constraint={self.norm_constraint} must be positive; null sets no limit")


@dataclass(frozen=True)
class _Chunk:
    """Facts that are updated together, and what of their forward pass does not depend on ΔW.

    keys: [n, T, M] of the lowest edited layer.
    """

    target: TargetLoss
    state: SuffixState
    keys: Tensor


def fine_tune(lm: EditableLM, facts: Sequence[Fact], *, hparams: FineTuningHparams, method: str = "ft-l") -> Edit:
    """Train ΔW of the down-projections until the model answers with the new targets.

    Args:
        facts: one or more; with several, one pass updates once per `ft_batch` of them, in the order given.
    Returns:
        Edit with a dense delta per layer. `notes`: losses, the mean of each pass before its updates, updates, and
        numbers of the facts that were answered before (`answered.py`).
    Raises:
        LayerError: no such layer. NothingToEditError: every loss lies below 0.01 from the start.
        TokenizationError, PromptError: see `EditableLM.answer`.
    Cost: one forward up to the lowest edited layer, then `ft_steps` forwards and backwards of the layers above.
    """
    for layer in hparams.layers:
        lm.check_layer(layer)
    answers = are_answered(lm, facts, target_tok=hparams.target_tok)
    before = [number for number, is_answered in enumerate(answers) if is_answered]
    dtype = torch.promote_types(lm.dtype, torch.float32)
    changes = {
        layer: torch.zeros(
            lm.linear_shape(layer, "down"), dtype=dtype, device=next(lm.down_proj(layer).parameters()).device
        ).requires_grad_()
        for layer in hparams.layers
    }
    chunks = [
        _chunk(lm, facts[begin : begin + hparams.ft_batch], hparams, dtype)
        for begin in range(0, len(facts), hparams.ft_batch)
    ]
    above = tuple(ModuleEdit(layer, Dense(changes[layer])) for layer in changes if layer > min(hparams.layers))
    # the leaves themselves are applied, so that every forward sees their latest values and gradients reach them
    with Edit((), method, {}, lm.fingerprint, above).applied(lm), torch.enable_grad():
        losses, updates = _train(lm, chunks, changes, hparams)
    if not updates:
        raise nothing_to_edit(facts)  # every loss lay below the floor from the start
    return Edit(
        facts=tuple(facts),
        method=method,
        hparams=flat_mapping(hparams),
        fingerprint=lm.fingerprint,
        modules=tuple(ModuleEdit(layer, Dense(change.detach())) for layer, change in changes.items()),
        notes={"losses": losses, "updates": updates, "answered_before": before},
        model_name=lm.name,
    )


def _chunk(lm: EditableLM, facts: Sequence[Fact], hparams: FineTuningHparams, dtype: torch.dtype) -> _Chunk:
    target = TargetLoss.of(lm, facts, objective=hparams.ft_objective, target_tok=hparams.target_tok)
    lowest = min(hparams.layers)
    site = Site("key", lowest)
    with lm.capture([site]) as seen:
        state = lm.suffix_state(target.batch(lm), lowest, [0] * len(facts))
    return _Chunk(target, state, seen[site].to(dtype))


def _loss(lm: EditableLM, chunk: _Chunk, lowest_change: Tensor) -> Tensor:
    hidden = chunk.state.hidden + (chunk.keys @ lowest_change.T).to(chunk.state.hidden)
    return chunk.target(lm.resume(chunk.state, hidden, at=chunk.target.at))


def _train(
    lm: EditableLM, chunks: Sequence[_Chunk], changes: dict[int, Tensor], hparams: FineTuningHparams
) -> tuple[list[float], int]:
    """Mean loss of each pass, and the number of updates."""
    adam: Adam[int] = Adam()
    course, n_facts = Course(lm.device), sum(chunk.target.n_facts for chunk in chunks)
    means: list[Tensor] = []
    total = torch.zeros((), dtype=torch.float64, device=lm.device)
    for number, chunk in enumerate((chunk for _ in range(hparams.ft_steps) for chunk in chunks), 1):
        loss = _loss(lm, chunk, changes[min(changes)])
        wide = loss.detach().double()  # float32 has no such number as the floor
        skip = course.enter(wide < LOSS_FLOOR)
        if skip is not True:
            gradients = torch.autograd.grad(loss, list(changes.values()))
            _update(changes, adam.step(dict(zip(changes, gradients, strict=True)), skip=skip), hparams)
        total = total + wide * chunk.target.n_facts
        if number % len(chunks) == 0:
            means.append(total / n_facts)
            course.end_pass(means[-1] < LOSS_FLOOR)
            total = torch.zeros_like(total)
        if course.has_ended():
            break
    n_passes, updates = course.told()
    return torch.stack(means[:n_passes]).tolist(), updates


@torch.no_grad()
def _update(changes: dict[int, Tensor], steps: dict[int, Step], hparams: FineTuningHparams) -> None:
    for layer, step in steps.items():
        change = changes[layer]
        change.add_(step.made((step.mean * (-hparams.ft_lr / step.correction)).div_(step.root)))
        if hparams.norm_constraint is not None:
            change.clamp_(-hparams.norm_constraint, hparams.norm_constraint)
