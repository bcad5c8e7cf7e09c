"""Adam on the free vectors of a value, several groups of facts at once (methods §3).

The loss of a group depends on its own vector alone, so groups share a forward and are still optimised as if each were
alone: own Adam state (Adam works entry by entry), own clamp, own stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rep_fast.editors.value_texts import GroupTexts, LossRows
from rep_fast.models.transfer import sent
from rep_fast.ops.arriving import Late

_SMALLEST_NORM = 1e-12
_BETAS, _EPS = (0.9, 0.999), 1e-8
# PMET: once every text is answered the target counts a tenth, and the descent ends when the KL term is this small
_ANSWERED_WEIGHT, _ANSWERED_KL = 0.1, 0.01


@dataclass(frozen=True)
class ValueHparams:
    """Hyper-parameters of the optimisation, named as in the field.

    v_steps forwards are made and v_steps − 1 updates; early_stop ends before an update once the loss is below it
    (None: never); ‖δ‖ ≤ clamp_norm_factor·‖v_0‖. v_loss_layer: the layer whose residual stream the targets are read
    from by final norm and head, None for the last (ROME always reads the last). stop_when_answered: PMET's rule, once
    the target is the most likely answer to every text its loss counts a tenth, and a small KL term ends the descent.
    """

    v_steps: int = 25
    v_lr: float = 0.5
    v_weight_decay: float = 1e-3
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625
    early_stop: float | None = 0.05
    v_loss_layer: int | None = None
    stop_when_answered: bool = False


class Forward(Protocol):
    """A model in which groups' vectors are added at their sites."""

    @property
    def groups(self) -> Sequence[GroupTexts]:
        """What is optimised, one vector per group and site."""

    def logits(self, deltas: Tensor) -> Tensor:
        """Logits [Σ, V] at the groups' `answer_at`, row after row, for deltas [G, S, D]."""

    def select(self, groups: Sequence[int]) -> Forward:
        """The same for some of the groups."""


@dataclass(frozen=True)
class Descent:
    """What happened to one group: losses and deltas [steps, S, D] of each forward; per fact whether the unedited model
    already answered its bare prompt with the new target."""

    losses: tuple[float, ...]
    deltas: Tensor
    answered: tuple[bool, ...]


def descend(forward: Forward, v_0: Tensor, hparams: ValueHparams, *, lag: int | None = None) -> list[Descent]:
    """Optimise one vector per group and site.

    L(δ) = mean NLL of the targets + kl_factor·KL(p_δ ‖ p_0) + Σ_sites v_weight_decay·‖δ‖/‖v_0‖²; δ and Adam's state are
    float32 or wider whatever the model's dtype.

    Args:
        v_0: [G, S, D], the unedited value of each group at each site.
        lag: steps after which the host learns which groups are done; None: 0 on the CPU, elsewhere 1, so that it never
            waits for a step without having queued the next. A group that is done does not move, so that the result is
            that of lag 0 (of several groups, to the rounding of the sizes of their batches).
    """
    dtype = torch.promote_types(v_0.dtype, torch.float32)
    norms = v_0.detach().to(dtype).norm(dim=-1)
    deltas = torch.zeros(v_0.shape, dtype=dtype, device=v_0.device)
    adam = _Adam(deltas, hparams.v_lr)
    progress = _Progress(len(norms), Late(v_0.device, lag=lag))
    answered: list[tuple[bool, ...]] = []
    active, loss_of = torch.arange(len(norms), device=v_0.device), None
    is_done = torch.zeros(len(norms), dtype=torch.bool, device=v_0.device)
    for step in range(hparams.v_steps):
        free = deltas[active].requires_grad_()
        log_p = forward.logits(free).to(dtype).log_softmax(dim=-1)
        if loss_of is None:
            rows = LossRows.of(forward.groups, device=log_p.device)
            loss_of = _Loss(rows, log_p[rows.kl_at].detach(), norms, hparams)
            answered = rows.facts_answered(log_p)
        loss, done = loss_of(log_p, free)
        is_done = is_done | done.to(is_done.device)
        left = progress.after(loss.detach(), free.detach(), is_done)
        if not left or step == hparams.v_steps - 1:
            break
        (gradient,) = torch.autograd.grad(loss.sum(), [free])  # weights get no gradient, nothing accumulates
        if len(left) < len(active):
            kept = sent(torch.tensor(left), active.device)
            active, gradient, is_done = active[kept], gradient[kept], is_done[kept]
            forward = forward.select(left)
            loss_of = loss_of.select(kept, forward.groups)
        before = deltas[active]
        moved = _clamped(before - adam.step(gradient, active), hparams.clamp_norm_factor * norms[active])
        deltas[active] = torch.where(is_done[:, None, None], before, moved)
    return progress.descents(answered)


def _clamped(deltas: Tensor, bounds: Tensor) -> Tensor:
    """Vectors [G, S, D] cut to the norms [G, S] where they are longer."""
    return deltas * (bounds[..., None] / deltas.norm(dim=-1, keepdim=True).clamp_min(_SMALLEST_NORM)).clamp_max(1.0)


class _Shown(NamedTuple):
    """What a forward of some groups showed: losses [A], deltas [A, S, D] and who is done [A]."""

    groups: list[int]
    losses: Tensor
    deltas: Tensor
    is_done: Tensor


class _Progress:
    """What every forward showed, read in one copy at the end, and which groups go on.

    n_groups: at the start. late: tells the host that groups have ended.
    """

    def __init__(self, n_groups: int, late: Late) -> None:
        self._active, self._late = list(range(n_groups)), late
        self._shown: list[_Shown] = []

    def after(self, losses: Tensor, deltas: Tensor, is_done: Tensor) -> list[int]:
        """Takes in a forward of the active groups; returns the places among them of those not known to be done."""
        self._shown.append(_Shown(self._active, losses, deltas, is_done))
        told = self._late.after(is_done)
        if told is None:
            return list(range(len(self._active)))
        groups = self._shown[-1 - self._late.lag].groups
        done = {group for group, is_over in zip(groups, told.tolist(), strict=True) if is_over}
        left = [place for place, group in enumerate(self._active) if group not in done]
        self._active = [self._active[place] for place in left]
        return left

    def descents(self, answered: Sequence[tuple[bool, ...]]) -> list[Descent]:
        """Each group's forwards up to the one that ended it."""
        losses: list[list[float]] = [[] for _ in answered]
        paths: list[list[Tensor]] = [[] for _ in answered]
        ended: set[int] = set()
        values = iter(torch.cat([shown.losses for shown in self._shown]).tolist())
        ends = iter(torch.cat([shown.is_done for shown in self._shown]).tolist())
        for shown in self._shown:
            for group, delta, value, is_end in zip(shown.groups, shown.deltas, values, ends, strict=False):
                if group not in ended:
                    losses[group].append(value)
                    paths[group].append(delta)
                if is_end:
                    ended.add(group)
        return [Descent(tuple(a), torch.stack(b), c) for a, b, c in zip(losses, paths, answered, strict=True)]


class _Loss:
    """The loss of each group. log_p_0: [G, V], log-probabilities after the KL prompts before the first step."""

    def __init__(self, rows: LossRows, log_p_0: Tensor, norms: Tensor, hparams: ValueHparams) -> None:
        self._rows, self._log_p_0, self._norms, self._hparams = rows, log_p_0, norms, hparams

    def __call__(self, log_p: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [G] and whether each group is done [G]."""
        hparams = self._hparams
        nll = self._rows.nll(log_p)
        after = log_p[self._rows.kl_at]
        # expectation under the current distribution, as in ROME
        kl = hparams.kl_factor * (after.exp() * (after - self._log_p_0)).sum(dim=-1)
        decay = hparams.v_weight_decay * (deltas.norm(dim=-1) / self._norms**2).sum(dim=-1).to(kl.device)
        done = torch.zeros_like(kl, dtype=torch.bool)
        if hparams.stop_when_answered:
            is_answered = self._rows.groups_answered(log_p)
            nll = torch.where(is_answered, _ANSWERED_WEIGHT * nll, nll)
            done = is_answered & (kl <= _ANSWERED_KL)
        loss = nll + kl + decay
        if hparams.early_stop is not None:
            done = done | (loss < hparams.early_stop)
        return loss, done

    def select(self, left: Tensor, groups: Sequence[GroupTexts]) -> _Loss:
        """The loss of the groups `left`."""
        rows = LossRows.of(groups, device=self._log_p_0.device)
        return _Loss(rows, self._log_p_0[left.to(self._log_p_0.device)], self._norms[left], self._hparams)


class _Adam:
    """Adam's state for all groups; a step concerns those that are still moving."""

    def __init__(self, like: Tensor, lr: float) -> None:
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._lr, self._steps = lr, 0

    def step(self, gradient: Tensor, active: Tensor) -> Tensor:
        """What is to be subtracted from the parameters of the groups `active`."""
        self._steps += 1
        first, second = _BETAS
        mean = self._mean[active].lerp_(gradient, 1 - first)
        square = self._square[active].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self._mean[active], self._square[active] = mean, square
        scale = (square.sqrt() / (1 - second**self._steps) ** 0.5).add_(_EPS)
        return mean * (self._lr / (1 - first**self._steps)) / scale
