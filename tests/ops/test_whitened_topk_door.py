"""What the collision scan refuses, and what it tells of itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scan_checks import random_block, whitened_topk

from rep_fast import errors
from rep_fast.ops import LastTokenExclusion, PairExclusion, TopK, native, profile
from rep_fast.ops.topk_state import PASSES, REASONS

pytestmark = pytest.mark.filterwarnings("ignore:whitened_topk. the plain torch body serves")

KEYS, QUERIES = random_block(4, 2, 3)
STARTS = torch.tensor([0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keys": KEYS.double()}, r"keys must be \(tokens, width\) bfloat16\|float16\|float32, got \(4, 3\) float64"),
        ({"keys": KEYS[0]}, r"keys must be \(tokens, width\) .* got \(3,\) float32"),
        ({"queries": QUERIES.half()}, r"queries must be \(queries, width\) float32, got \(2, 3\) float16"),
        ({"queries": QUERIES[:, :2]}, "keys are 3 wide, queries 2"),
        ({"keys": KEYS[:3].T}, r"columns of keys must be contiguous, got stride 3; call .contiguous\(\)"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"first_id": -1}, "first_id must be at least 0, got -1"),
        ({"precision": "tf32"}, "precision must be one of auto, fp64, fp32, bf16, bf16x2, int8, got 'tf32'"),
        ({"nonfinite": "skip"}, "nonfinite must be one of raise, exclude, got 'skip'"),
        ({"delta": 0.0}, "delta must lie between 0 and 1, got 0.0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*63\), got -1"),
        ({"state": TopK.empty(2, 3)}, "the state keeps k=3 hits, asked for k=2"),
        ({"state": TopK.empty(5, 2)}, r"the state is \(5, 2\), but there are 2 queries"),
        ({"queries": QUERIES.to("meta")}, "keys are on cpu, queries on meta"),
        (
            {"exclusion": LastTokenExclusion(torch.arange(3), STARTS, torch.arange(2))},
            "exclusion has 3 tokens and 2 last tokens, but there are 4 keys and 2 queries",
        ),
        ({"exclusion": PairExclusion(torch.tensor([0, 0]), STARTS[:0])}, "exclusion has 1 rows, but there are 4 keys"),
        (
            {"exclusion": PairExclusion(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([2]))},
            "exclusion lists query 2 or a negative one, but there are 2 queries",
        ),
    ],
)
def test_arguments_that_do_not_fit(scan_level: str, changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"keys": KEYS, "queries": QUERIES, "k": 2} | changed
    with pytest.raises(errors.HparamError, match=message):
        whitened_topk(arguments.pop("keys"), arguments.pop("queries"), arguments.pop("k"), **arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LastTokenExclusion(KEYS, STARTS, STARTS), "token_ids must be one-dimensional int64, got"),
        (lambda: LastTokenExclusion(STARTS, STARTS[:0], STARTS), "sequence_starts must be ascending"),
        (lambda: LastTokenExclusion(torch.arange(4), torch.tensor([1]), STARTS), "sequence_starts must be ascending"),
        (lambda: LastTokenExclusion(torch.arange(4), torch.tensor([0, 2, 2]), STARTS), "sequence_starts must be"),
        (lambda: LastTokenExclusion(torch.arange(4), torch.tensor([0, 4]), STARTS), "reaches row 4, but there are 4"),
        (lambda: LastTokenExclusion(STARTS, STARTS, STARTS, window=-1), "window must be at least 0, got -1"),
        (lambda: PairExclusion(torch.tensor([0, 2]), STARTS), "indptr must run from 0 to 1"),
        (lambda: PairExclusion(torch.tensor([0, 1, 0, 1]), STARTS), "not descending"),
        (lambda: TopK.empty(2, 0), "needs k >= 1"),
        (lambda: TopK.empty(2, 1).merge(TopK.empty(2, 2)), r"differ, \(2, 1\) and \(2, 2\)"),
        (
            lambda: TopK.from_tensors({"ids": STARTS}),
            "needs the tensors counts, dropped_queries, exact_scores, ids, pass_counts, reason_counts",
        ),
        (lambda: TopK.from_tensors(TopK.empty(2, 1).to_tensors() | {"ids": STARTS}), "the tensors do not fit together"),
    ],
)
def test_states_and_rules_that_do_not_fit(build: Any, message: str) -> None:
    with pytest.raises(errors.HparamError, match=message):
        build()


@pytest.mark.parametrize("with_rule", [False, True])
def test_passes_opcheck(scan_level: str, with_rule: bool) -> None:
    keys, queries = random_block(20, 4, 6)
    state = TopK.empty(4, 3)
    rule = LastTokenExclusion(torch.arange(20), STARTS, torch.arange(4)).arguments() if with_rule else {}
    names = ("token_ids", "sequence_starts", "last_tokens", "lookback", "window", "indptr", "subjects")
    rest = [rule.get(name, 0 if name == "window" else None) for name in names]
    arguments = (keys, queries, state.exact_scores, state.ids, 0, *rest, "fp32", 1e-9, 0)
    torch.library.opcheck(torch.ops.rep_fast.whitened_topk.default, arguments)


def test_warns_when_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find", lambda: native.Native(None, "it was not built"))
    with pytest.warns(RuntimeWarning, match="the plain torch body serves, since it was not built"):
        whitened_topk(KEYS, QUERIES, 2)


def test_profile_counts_the_work(scan_level: str) -> None:
    keys, queries = random_block(10, 4, 6, dtype=torch.bfloat16)
    with profile() as calls:
        whitened_topk(keys, queries, 3)
    whitened_topk(keys, queries, 3)
    (call,) = calls
    assert (call.op, call.flops) == ("whitened_topk", 2 * 10 * 4 * 6)
    assert call.bytes == 10 * 6 * 2 + 4 * 6 * 4 + 2 * 4 * 3 * 16
    is_level = scan_level != "reference" and not scan_level.startswith("cuda")
    assert call.backend.startswith(f"native-{scan_level}" if is_level else scan_level)
    assert call.elapsed > 0


def test_passes_are_the_native_modules() -> None:
    module = native.find().module
    if module is None:
        pytest.skip("needs the native module")
    assert list(PASSES) == module.scan_passes
    assert list(REASONS) == module.pass_reasons
