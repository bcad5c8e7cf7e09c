"""What the collision scan leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from scan_checks import assert_is_top, brute_force, exact_products, random_block, same_bits, whitened_topk

from rep_fast.ops import LastTokenExclusion, PairExclusion

pytestmark = pytest.mark.filterwarnings("ignore:whitened_topk. the plain torch body serves")


@pytest.mark.parametrize("window", [0, 3, 10, 400])
@pytest.mark.parametrize("n_before", [None, 0, 2, 25])
def test_last_token_rule_is_the_mask(scan_level: str, window: int, n_before: int | None) -> None:
    generator = torch.Generator().manual_seed(window)
    keys, queries = random_block(230, 21, 20)
    rule = LastTokenExclusion(
        token_ids=torch.randint(0, 12, (230,), generator=generator),
        sequence_starts=torch.tensor([0, 1, 4, 96, 97, 190, 229]),
        last_tokens=torch.randint(0, 14, (21,), generator=generator),
        window=window,
        lookback=None if n_before is None else torch.randint(0, 12, (n_before,), generator=generator),
    )
    mask = brute_force(rule, 230)
    assert 0 < int(mask.sum()) < mask.numel()
    for precision in ("fp32", "fp64"):
        result = whitened_topk(keys, queries, 15, exclusion=rule, precision=precision)
        assert_is_top(result, *exact_products(keys, queries, mask))


def test_tail_carries_a_sequence_into_the_next_block(scan_level: str) -> None:
    generator = torch.Generator().manual_seed(8)
    keys, queries = random_block(60, 9, 20)
    tokens, last_tokens = torch.randint(0, 9, (60,), generator=generator), torch.arange(9)
    whole = LastTokenExclusion(tokens, torch.tensor([0, 10]), last_tokens, window=4)
    want = whitened_topk(keys, queries, 8, exclusion=whole)
    state, lookback = None, None
    for start, end, starts in ((0, 12, [0, 10]), (12, 14, [0]), (14, 60, [0])):
        rule = LastTokenExclusion(tokens[start:end], torch.tensor(starts), last_tokens, window=4, lookback=lookback)
        state = whitened_topk(keys[start:end], queries, 8, exclusion=rule, state=state, first_id=start)
        lookback = rule.tail()
        assert lookback.numel() <= 4
    assert state is not None
    assert same_bits(state, want)


def test_pair_rule_is_the_mask(scan_level: str) -> None:
    keys, queries = random_block(1100, 14, 20)
    mask = torch.rand(1100, 14, generator=torch.Generator().manual_seed(2)) < 0.3
    mask[5] = True
    mask[6] = False
    rows, subjects = mask.nonzero(as_tuple=True)
    rule = PairExclusion(torch.searchsorted(rows, torch.arange(1101)), subjects)
    assert_is_top(whitened_topk(keys, queries, 12, exclusion=rule), *exact_products(keys, queries, mask))


def test_everything_excluded_leaves_nothing(scan_level: str) -> None:
    keys, queries = random_block(30, 2, 5)
    rule = LastTokenExclusion(torch.ones(30, dtype=torch.int64), torch.tensor([0]), torch.tensor([1, 1]))
    result = whitened_topk(keys, queries, 3, exclusion=rule)
    assert (result.ids == -1).all()
    assert (result.scores == -math.inf).all()
