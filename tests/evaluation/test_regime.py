from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rep_fast.errors import HparamError
from rep_fast.evaluation import Regime


@pytest.mark.parametrize(
    ("text", "group", "step"),
    [
        ("single", 1, 1),
        ("batch:100", 100, 100),
        ("sequential:5", 5, 1),
        ("sequential", None, 1),
        ("cumulative:100", None, 100),
        ("joint-epochs", None, None),
    ],
)
def test_names_are_read_back(text, group, step):
    regime = Regime.parse(text)
    assert (regime.name, regime.group, regime.step) == (text, group, step)
    assert regime.is_stacked == (text != "single")


@pytest.mark.parametrize(
    ("text", "every", "told"),
    [
        ("batches:3", None, "'batches:3' is unknown; write single, batch:100"),
        ("batch", None, "'batch' is unknown; write"),
        ("cumulative", None, "unknown"),
        ("batch:x", None, "unknown"),
        ("single:3", None, "unknown"),
        ("", None, "unknown"),
        ("batch:0", None, "group of regime 'batch:0' is 0; it must be 1 or more"),
        ("cumulative:0", None, "step of regime 'cumulative:0' is 0"),
        ("sequential:-1", None, "is -1"),
        ("sequential:5", 0, "evaluate_every of regime 'sequential:5' is 0"),
        ("sequential:5", 5, "evaluated after its 5 edits anyway"),
        ("batch:5", 1, "evaluated after its 1 edit anyway"),
        ("joint-epochs", 1, "1 edit anyway"),
        ("single", 1, "1 edit anyway"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(text, every, told):
    with pytest.raises(HparamError) as refusal:
        Regime.parse(text, evaluate_every=every)
    assert told in str(refusal.value)


def test_a_step_larger_than_its_group_is_refused():
    with pytest.raises(HparamError, match="writes 3 records at once into groups of 2"):
        Regime("own", group=2, step=3)


@given(
    n=st.integers(1, 40),
    group=st.none() | st.integers(1, 12),
    step=st.none() | st.integers(1, 12),
    every=st.none() | st.integers(1, 5),
)
def test_every_record_is_written_once_and_evaluated_at_its_groups_end(n, group, step, every):
    try:
        regime = Regime("own", group, step, every)
    except HparamError:
        return
    records = list(range(n))
    groups = list(regime.groups(records))
    assert [record for own in groups for record in own] == records
    assert all(len(own) == group for own in groups[:-1])
    for own in groups:
        steps = list(regime.steps(own))
        assert [record for one in steps for record in one] == list(own)
        assert all(len(one) == step for one in steps[:-1])
        ends = [sum(map(len, steps[: count + 1])) for count in range(len(steps))]
        wanted = {end for count, end in enumerate(ends, start=1) if every and count % every == 0}
        assert regime.evaluated_after(len(own)) == tuple(sorted({*wanted, len(own)}))


def test_records_that_do_not_fill_the_groups_are_told_of():
    assert Regime.batch(100).note(200) is None
    assert Regime.cumulative(100).note(250) is None
    assert Regime.batch(100).note(24) == "regime batch:100: there are only 24 records, they make one group"
    assert Regime.sequential(5).note(12) == "regime sequential:5: the last group has 2 records instead of 5"
