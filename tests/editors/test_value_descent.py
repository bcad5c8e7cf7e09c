"""The descent on made-up models, whose logits are linear in δ: every term of the loss, Adam, clamp and stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rep_fast.editors import ValueHparams
from rep_fast.editors.value_descent import descend
from rep_fast.editors.value_texts import GroupTexts
from rep_fast.facts import Fact

D, VOCABULARY, TARGETS = 4, 11, (3, 7, 1)
FACT = Fact("{} is", "Slovenia", "green")
HPARAMS = ValueHparams(v_steps=2, v_lr=0.3, kl_factor=0.7, v_weight_decay=0.2, early_stop=None)
# two texts of three target tokens, then the KL prompt
GROUP = GroupTexts((FACT,), ((0,),) * 3, (0,) * 3, ((0, 1, 2),) * 2 + ((0,),), (1,) * 3, (TARGETS, TARGETS, ()), 2)


@dataclass(frozen=True)
class Linear:
    """Logits base + Σ_sites δ map for each group: base [G, 7, V], map [S, D, 7·V]."""

    groups: Sequence[GroupTexts]
    base: Tensor
    map: Tensor

    @classmethod
    def random(cls, n_groups: int, *, n_sites: int = 1, seed: int = 0) -> Linear:
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(n_groups, 7, VOCABULARY, generator=generator, dtype=torch.float64)
        map_ = torch.randn(n_sites, D, 7 * VOCABULARY, generator=generator, dtype=torch.float64)
        return cls([GROUP] * n_groups, base, map_)

    def logits(self, deltas: Tensor) -> Tensor:
        moved = torch.einsum("gsd,sdv->gv", deltas, self.map).reshape(self.base.shape)
        return (self.base + moved).reshape(-1, VOCABULARY)

    def select(self, groups: Sequence[int]) -> Linear:
        return Linear([self.groups[number] for number in groups], self.base[list(groups)], self.map)


def v_0(n_groups: int, n_sites: int = 1) -> Tensor:
    return torch.arange(1.0, 1 + n_groups * n_sites * D, dtype=torch.float64).reshape(n_groups, n_sites, D)


def terms(forward: Linear, group: int, delta: Tensor, hparams: ValueHparams, norms: Tensor) -> tuple[Tensor, ...]:
    """NLL, weighted KL and decay of one group, written down from methods §3."""
    rows = Linear(forward.groups, forward.base[group][None], forward.map)
    log_p, log_p_0 = rows.logits(delta[None]).log_softmax(-1), rows.logits(0 * delta[None]).log_softmax(-1)
    nll = -sum(log_p[3 * text + step, token] for text in range(2) for step, token in enumerate(TARGETS)) / 6
    kl = (log_p[6].exp() * (log_p[6] - log_p_0[6])).sum()
    return nll, hparams.kl_factor * kl, hparams.v_weight_decay * (delta.norm(dim=-1) / norms**2).sum()


@pytest.mark.parametrize("n_sites", [1, 2])
def test_the_loss_has_its_three_terms(n_sites: int) -> None:
    """T-kl-dir among them: Σ p_δ (log p_δ − log p_0)."""
    forward, start = Linear.random(3, n_sites=n_sites), v_0(3, n_sites)
    for group, found in enumerate(descend(forward, start, HPARAMS)):
        for step in range(2):
            wanted = sum(terms(forward, group, found.deltas[step], HPARAMS, start[group].norm(dim=-1)))
            assert found.losses[step] == pytest.approx(float(wanted), rel=1e-9)


def test_the_path_is_that_of_torch_adam() -> None:
    forward, start = Linear.random(2, n_sites=2), v_0(2, 2)
    hparams = replace(HPARAMS, v_steps=8, clamp_norm_factor=1e9)
    for group, found in enumerate(descend(forward, start, hparams)):
        delta = torch.full((2, D), 1e-30, dtype=torch.float64, requires_grad=True)  # a norm has no gradient at 0
        optimiser = torch.optim.Adam([delta], lr=hparams.v_lr)
        for step in range(8):
            torch.testing.assert_close(found.deltas[step], delta.detach(), rtol=1e-9, atol=1e-12)
            optimiser.zero_grad()
            sum(terms(forward, group, delta, hparams, start[group].norm(dim=-1))[:2]).backward()
            with torch.no_grad():  # the decay's gradient by hand, 0 at the start as torch has it
                norms = delta.norm(dim=-1, keepdim=True)
                if step:
                    delta.grad += hparams.v_weight_decay * delta / norms / start[group].norm(dim=-1, keepdim=True) ** 2
            optimiser.step()


def test_every_site_has_its_own_clamp() -> None:
    forward, start = Linear.random(2, n_sites=2), v_0(2, 2)
    found = descend(forward, start, replace(HPARAMS, v_steps=6, v_lr=50.0, clamp_norm_factor=0.25))
    for group, descent in enumerate(found):
        bound = 0.25 * start[group].norm(dim=-1)
        torch.testing.assert_close(descent.deltas[-1].norm(dim=-1), bound, rtol=1e-9, atol=0)


def test_early_stop_ends_a_group_alone() -> None:
    forward, start = Linear.random(4), v_0(4)
    hparams = replace(HPARAMS, v_steps=12)
    free = descend(forward, start, hparams)
    stop = sorted(descent.losses[4] for descent in free)[1] * (1 + 1e-12)
    for whole, found in zip(free, descend(forward, start, replace(hparams, early_stop=stop)), strict=True):
        n = len(found.losses)
        assert all(loss >= stop for loss in found.losses[:-1])
        assert found.losses[-1] < stop or n == 12
        torch.testing.assert_close(found.deltas, whole.deltas[:n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lag", [1, 2, 30])
def test_what_the_host_learns_late_changes_nothing(lag: int) -> None:
    """A group that is done stays where it is: bit for bit alone, to rounding in a batch, whose size differs."""
    hparams = replace(HPARAMS, v_steps=12)
    stop = sorted(descent.losses[4] for descent in descend(Linear.random(4), v_0(4), hparams))[1] * (1 + 1e-12)
    hparams = replace(hparams, early_stop=stop)
    lengths = set()
    for group in range(4):
        whole = Linear.random(4)
        alone, start = Linear([GROUP], whole.base[group][None], whole.map), v_0(4)[group][None]
        (expected,), (found,) = (descend(alone, start, hparams, lag=late) for late in (0, lag))
        assert found.losses == expected.losses
        assert torch.equal(found.deltas, expected.deltas)
        lengths.add(len(found.losses))
    assert len(lengths) > 1
    at_once, late = (descend(Linear.random(4), v_0(4), hparams, lag=late) for late in (0, lag))
    for expected, found in zip(at_once, late, strict=True):
        assert found.losses == pytest.approx(expected.losses, rel=1e-12)
        torch.testing.assert_close(found.deltas, expected.deltas, rtol=1e-12, atol=1e-12)


def test_a_lag_costs_as_many_forwards_and_no_more() -> None:
    counted = []

    class Counted(Linear):
        def logits(self, deltas: Tensor) -> Tensor:
            counted.append(len(deltas))
            return super().logits(deltas)

    hparams = replace(HPARAMS, v_steps=20, early_stop=1e9)  # done at once
    for lag in (0, 1, 3):
        whole = Linear.random(2)
        descend(Counted(whole.groups, whole.base, whole.map), v_0(2), hparams, lag=lag)
        assert len(counted) == 1 + lag
        counted.clear()


def test_pmet_stops_once_every_text_is_answered_and_the_kl_term_is_small() -> None:
    """The target's weight falls to a tenth where all texts are answered; then a weighted KL of 0.01 ends it."""
    forward, start = Linear.random(5, seed=2), v_0(5)
    towards = forward.map.view(1, D, 7, VOCABULARY)
    towards[0, :, 6] *= 0.1  # the KL prompt hardly moves
    towards[0, 0, range(6), [*TARGETS, *TARGETS]] += 5  # δ's first entry raises every target
    hparams = replace(HPARAMS, v_steps=40, v_lr=0.1, kl_factor=0.02, stop_when_answered=True)
    seen = set()
    for group, found in enumerate(descend(forward, start, hparams)):
        for step, loss in enumerate(found.losses):
            nll, kl, decay = terms(forward, group, found.deltas[step], hparams, start[group].norm(dim=-1))
            single = Linear(forward.groups, forward.base[group][None], forward.map)
            best = single.logits(found.deltas[step][None]).argmax(-1)[:6].tolist()
            is_answered = best == [*TARGETS, *TARGETS]
            assert loss == pytest.approx(float((0.1 if is_answered else 1.0) * nll + kl + decay), rel=1e-9)
            stops = is_answered and float(kl) <= 0.01
            assert stops == (step == len(found.losses) - 1 and len(found.losses) < 40)
            seen.add((is_answered, stops))
    assert (True, True) in seen
    assert (False, False) in seen


def test_what_is_answered_already_is_reported_per_fact() -> None:
    """Two facts in one group: the first text of each is its bare prompt."""
    both = GroupTexts(
        (FACT, FACT), ((0,),) * 5, (0,) * 5, ((0,),) * 5, (1,) * 5, ((3,), (3,), (7,), (7,), ()), 2
    )  # fmt: skip
    logits = torch.zeros(5, VOCABULARY, dtype=torch.float64)
    logits[[0, 1, 3], [3, 0, 7]] = 5.0

    class Constant:
        groups = (both,)

        def logits(self, deltas: Tensor) -> Tensor:
            return logits + 0 * deltas.sum()

        def select(self, groups: Sequence[int]) -> Constant:
            return self

    (found,) = descend(Constant(), v_0(1), HPARAMS)
    assert found.answered == (True, False)
