"""Solves on a GPU read their residuals a step late: the host waits as often however many steps there are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count

import pytest
import torch
from pretend_devices import FIRST, PretendDevices, Pretended, held
from test_spd_solver import moment_of_condition, random_columns, residual
from torch import Tensor

from rep_fast.ops import SpdSolver, arriving, spd_solver

# what is asked for, steps of refinement before conjugate gradients take over, and how the solution is reached
SOLVES = {
    "tolerance": ({}, 20, "refinement"),
    "backward error": ({"backward_error": 1e-13}, 20, "refinement"),
    "forward error": ({"forward_error": 1e-10}, 20, "refinement"),
    "conjugate gradients": ({}, 1, "conjugate gradients"),
}
CONDITIONS = (1e4, 1e6)
TOLERANCE = 3e-9


@pytest.fixture(params=list(SOLVES))
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], str]:
    wanted, refinements, method = SOLVES[request.param]
    monkeypatch.setattr(spd_solver, "_MAX_REFINEMENTS", refinements)
    return wanted, method


def test_steps_of_a_solve(asked: tuple[dict[str, float], str]) -> None:
    wanted, method = asked
    waits, steps = [], []
    for condition in CONDITIONS:
        C, b = moment_of_condition(300, condition), random_columns(300, 5)
        with PretendDevices() as devices:
            solver = SpdSolver.factor(Pretended(C, FIRST), precision="fp32", tolerance=TOLERANCE)
            x = held(solver.solve(Pretended(b, FIRST), **wanted))
        assert solver.report.method == method
        if not wanted:
            assert residual(C, x, b) <= TOLERANCE
            assert solver.report.residual == pytest.approx(residual(C, x, b), rel=0.1)
        waits.append(devices.own_waits)
        steps.append(solver.report.iterations)
    assert steps[0] < steps[1]
    assert waits[0] == waits[1]


def test_tiles_of_a_moment() -> None:
    waits = []
    for M in (250, 1000):
        with PretendDevices() as devices:
            SpdSolver.factor(Pretended(moment_of_condition(M, 10), FIRST), precision="fp32")
        waits.append(devices.own_waits)
    assert waits[0] == waits[1]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_late_host_gets_the_same_solution(
    monkeypatch: pytest.MonkeyPatch, asked: tuple[dict[str, float], str], condition: float, precision: str
) -> None:
    """And the same report: a step that was made in vain is not counted."""
    C, b = moment_of_condition(300, condition), random_columns(300, 5)
    found = []
    for lag in (0, 1):
        monkeypatch.setattr(arriving, "lag_on", lambda _, lag=lag: lag)
        solver = SpdSolver.factor(C, precision=precision, tolerance=TOLERANCE)
        found.append((solver.solve(b, **asked[0]), repr(solver.report)))  # a residual may be NaN
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_a_step_that_should_be_the_last_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second step is made where the first is expected to end the loop; where it does not, the next ones follow."""
    monkeypatch.setattr(arriving, "lag_on", lambda _: 1)
    made: list[int] = []

    def steps() -> Iterator[tuple[int, Tensor]]:
        for number in count():
            made.append(number)
            yield number, torch.tensor(float(number))

    for ends, expected in ((None, [0, 1, 2, 3]), (lambda known: known == [0.0, 1.0], [0, 1, 2])):
        made.clear()
        for number, value in arriving.read_late(steps(), ends=ends):
            assert value == number
            if number == 2:
                break
        assert made == expected


def test_late_tells_what_was_shown_before() -> None:
    at_once, late = (arriving.Late(torch.device("cpu"), lag=lag) for lag in (0, 2))
    told = [(at_once.after(torch.tensor(n)), late.after(torch.tensor(n))) for n in range(4)]
    assert [int(first) for first, _ in told] == [0, 1, 2, 3]
    assert [None if other is None else int(other) for _, other in told] == [None, None, 0, 1]


def test_what_is_made_of_numbers_that_are_read_late() -> None:
    assert [value for _, value in arriving.read_late((None, torch.tensor(x)) for x in (2.0, math.inf))] == [
        2.0,
        math.inf,
    ]
