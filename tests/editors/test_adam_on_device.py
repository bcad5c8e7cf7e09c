"""Adam whose steps may be skipped on the device: the bits of torch's, and of a run without the skipped steps."""

from __future__ import annotations

import pytest
import torch
from pretend_devices import FIRST, SECOND, PretendDevices, Pretended, held
from torch import Tensor

from rep_fast.editors.adam import Adam
from rep_fast.editors.course import Course

N_STEPS = 150  # the table of corrections grows twice


def gradients(dtype: torch.dtype = torch.float32, n: int = N_STEPS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 7, generator=generator).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bits_are_torchs(dtype: torch.dtype) -> None:
    theirs = torch.ones(5, 7, dtype=dtype, requires_grad=True)
    ours, adam = theirs.detach().clone(), Adam()
    optimiser = torch.optim.Adam([theirs], lr=0.02)
    for gradient in gradients(dtype):
        theirs.grad = gradient.clone()
        optimiser.step()
        (step,) = adam.step({"w": gradient}).values()
        ours.add_((step.mean * (-0.02 / step.correction)).div_(step.root))
    assert torch.equal(ours, theirs.detach())


def test_a_skipped_step_was_never_made() -> None:
    """The first ones, some in between and two in a row; NaN does not pass."""
    skipped = {0, 1, 5, 70, 71, 149}
    plain, masked = Adam(), Adam()
    expected, found = [], []
    for number, gradient in enumerate(gradients()):
        is_skipped = number in skipped
        if not is_skipped:
            (step,) = plain.step({"w": gradient}).values()
            expected.append((step.mean / step.root).div_(step.correction))
        (step,) = masked.step(
            {"w": gradient * torch.nan if is_skipped else gradient}, skip=torch.tensor(is_skipped)
        ).values()
        move = step.made((step.mean / step.root).div_(step.correction))
        if is_skipped:
            assert not move.any()
        else:
            found.append(move)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_nothing_waits_and_every_device_has_its_own() -> None:
    adam, expected = Adam(), Adam()
    with PretendDevices() as devices:
        for number, gradient in enumerate(gradients(n=4)):
            there = {"a": Pretended(gradient, FIRST), "b": Pretended(2 * gradient, SECOND)}
            steps = adam.step(there, skip=Pretended(torch.tensor(number == 1), FIRST))
            assert [step.made(step.root).device for step in steps.values()] == [FIRST, SECOND]
            if number != 1:
                plain = expected.step({"a": gradient, "b": 2 * gradient})
        for name, step in steps.items():
            assert torch.equal(held(step.mean), plain[name].mean)
            assert torch.equal(held(step.root), plain[name].root)
        assert not devices.own_waits


@pytest.mark.parametrize("lag", [0, 1])
def test_a_course(monkeypatch: pytest.MonkeyPatch, lag: int) -> None:
    """Two batches a pass: in the second pass one holds, in the third both do, which is learned a batch late."""
    monkeypatch.setattr("rep_fast.ops.arriving.lag_on", lambda _: lag)
    course, entered = Course(torch.device("cpu")), []
    for number, holds in enumerate([False, False, True, False, True, True, False, False]):
        entered.append(bool(course.enter(torch.tensor(holds))))
        if number % 2:
            course.end_pass()
        if course.has_ended():
            break
    assert entered == [False, False, True, False, True, True, *[True] * lag]
    assert course.is_over()
    assert course.told() == (3, 3)


def test_a_course_without_an_end() -> None:
    course = Course(torch.device("cpu"))
    for _ in range(3):
        assert course.enter(None) is False
        course.end_pass()
        assert not course.has_ended()
    assert course.told() == (3, 3)
