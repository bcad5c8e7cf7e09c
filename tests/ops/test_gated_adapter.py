from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gate_checks import EPS, KEY_DTYPES, as_bits, logit_bound, random_adapter, random_keys, rows_with_clear_gates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rep_fast.errors import HparamError, NonFiniteError
from rep_fast.ops import AdapterWeights, gate_logits, gated_adapter, native, profile
from rep_fast.ops.gated_adapter import COMPOSITIONS
from rep_fast.reference import gated_adapter as reference


def machine_has(level: str) -> bool:
    module = native.find().module
    return module is not None and level in [module.level_name(row) for row in range(module.machine_level() + 1)]


pytestmark = pytest.mark.filterwarnings("ignore:gated_adapter. the plain torch body serves")

# (tokens, width, gate width): ones, primes, beside the tiles of 3 tokens × 8 rows, 16 lanes, panels of 48 rows, blocks
# of 768 (1536) in depth and of 192 tokens, and both sides of the sizes that choose how keys are read
SHAPES = (
    (1, 1, 1), (3, 17, 5), (4, 16, 8), (5, 31, 47), (17, 513, 49), (33, 47, 97), (2, 1030, 3), (2, 767, 7), (3, 769, 9),
    (13, 1537, 8), (47, 97, 17), (49, 33, 16), (191, 24, 9), (193, 40, 8), (340, 776, 11),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_logits_against_float64(
    level: str, dtype: torch.dtype, weights_dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    T, M, H = shape
    adapter = random_adapter(M, H, dtype=weights_dtype)
    keys = random_keys(T, M, dtype=dtype)
    error = (gate_logits(keys, adapter).double() - reference.gate_logits(keys, adapter)).abs()
    assert bool((error <= logit_bound(keys, adapter)).all())


@pytest.mark.parametrize("compose", COMPOSITIONS)
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_compositions_against_the_reference(level: str, dtype: torch.dtype, compose: str) -> None:
    M = 53
    adapters = [random_adapter(M, 7, seed=seed) for seed in range(4)]
    keys = random_keys(70, M, dtype=dtype)
    tau = [0.5, 0.3, 0.7, 0.4]
    found = gated_adapter(keys, adapters, tau=tau, compose=compose)
    wanted = reference.gated_adapter(keys, adapters, tau=tau, compose=compose)
    assert found.dtype == dtype
    # no logit may be so near its bound that float32 and float64 could decide differently
    clear = rows_with_clear_gates(keys, adapters, tau, compose)
    assert int(clear.sum()) > 50
    error = (found.double() - wanted).abs()[clear]
    bound = EPS[dtype] * wanted[clear].abs() + 1e-4
    assert bool((error <= bound).all())
    assert 0 < int((found != keys).any(1).sum()) < 70


@pytest.mark.parametrize("compose", COMPOSITIONS)
def test_compositions_in_float64(compose: str) -> None:
    adapters = [random_adapter(48, 6, dtype=torch.float64, seed=seed) for seed in range(5)]
    keys = random_keys(40, 48, dtype=torch.float64)
    found = gated_adapter(keys, adapters, tau=0.4, compose=compose)
    wanted = reference.gated_adapter(keys, adapters, tau=[0.4] * 5, compose=compose)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compose", COMPOSITIONS)
def test_gates_that_are_always_open_compose_with_others(level: str, compose: str) -> None:
    adapters = [random_adapter(30, 6, seed=seed) for seed in range(3)]
    keys = random_keys(20, 30)
    found = gated_adapter(keys, adapters, tau=[0.0, 0.5, 0.0], compose=compose)
    wanted = reference.gated_adapter(keys, adapters, tau=[0.0, 0.5, 0.0], compose=compose)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)


def test_chain_differs_from_sum_where_an_earlier_gate_moved_the_key() -> None:
    adapters = [random_adapter(20, 6, dtype=torch.float64, seed=seed) for seed in range(2)]
    keys = random_keys(9, 20, dtype=torch.float64)
    chained = gated_adapter(keys, adapters, tau=0.0)
    once = gated_adapter(keys, adapters[:1], tau=0.0)
    torch.testing.assert_close(chained, gated_adapter(once, adapters[1:], tau=0.0), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(chained, gated_adapter(keys, adapters, tau=0.0, compose="sum"))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    T=st.integers(0, 9),
    dtype=st.sampled_from((*KEY_DTYPES, torch.float64)),
    compose=st.sampled_from(COMPOSITIONS),
)
def test_shut_rows_keep_their_bits(seed: int, T: int, dtype: torch.dtype, compose: str) -> None:
    adapters = [random_adapter(12, 4, seed=seed + i) for i in range(2)]
    keys = random_keys(T, 12, dtype=dtype, seed=seed)
    keys[:, 3] = -0.0
    shut = gated_adapter(keys, adapters, tau=1.0, compose=compose)
    assert torch.equal(as_bits(shut), as_bits(keys))
    mixed = gated_adapter(keys, adapters, tau=0.6, compose=compose)
    bound = math.log(0.6 / 0.4)
    native_shut = torch.stack([gate_logits(keys, adapter) for adapter in adapters]).amax(0) < bound - 1e-4
    assert torch.equal(as_bits(mixed[native_shut]), as_bits(keys[native_shut]))


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.73, 1e-6, 1 - 1e-6])
def test_a_logit_exactly_at_tau_is_closed(level: str, tau: float) -> None:
    for dtype in (torch.float32, torch.float64):
        bound = torch.tensor([math.log(tau / (1 - tau))], dtype=dtype)
        adapter = random_adapter(8, 3, dtype=dtype)._replace(w2=torch.zeros(3, dtype=dtype), b2=bound)
        keys = random_keys(3, 8, dtype=dtype)
        assert torch.equal(gate_logits(keys, adapter), bound.expand(3))
        assert torch.equal(gated_adapter(keys, adapter, tau=tau), keys)
        above = torch.nextafter(bound, torch.full_like(bound, math.inf))
        assert not torch.equal(gated_adapter(keys, adapter._replace(b2=above), tau=tau), keys)


def test_tau_zero_opens_always_and_one_never(level: str) -> None:
    adapter = random_adapter(10, 4)._replace(b2=torch.tensor([-1e4]))
    keys = random_keys(6, 10)
    opened = gated_adapter(keys, adapter, tau=0.0)
    torch.testing.assert_close(opened, (keys + reference.projection(keys, adapter)).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(gated_adapter(keys, adapter._replace(b2=torch.tensor([1e4])), tau=1.0), keys)


def test_bits_depend_neither_on_the_other_tokens_nor_on_threads(level: str, threads: None) -> None:
    adapter = random_adapter(700, 101)
    keys = random_keys(67, 700, dtype=torch.bfloat16)
    torch.set_num_threads(1)
    logits, moved = gate_logits(keys, adapter), gated_adapter(keys, adapter, tau=0.4)
    one_by_one = torch.cat([gate_logits(row, adapter) for row in keys.split(1)])
    by_five = torch.cat([gated_adapter(rows, adapter, tau=0.4) for rows in keys.split(5)])
    torch.set_num_threads(3)
    threaded = gate_logits(keys, adapter)
    bound = 2 * logit_bound(keys, adapter)
    assert bool(((one_by_one - logits).abs() <= bound).all())
    if level not in (
        "reference",
        "cuda-on-cpu",
    ):  # library products promise no such thing, nor do few beside many tokens
        assert torch.equal(one_by_one, logits)
        assert torch.equal(by_five, moved)
        assert torch.equal(threaded, logits)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 31, 9), (3, 769, 8), (7, 17, 1), (50, 33, 49), (260, 1025, 5)], ids=str)
def test_reads_nothing_beyond_the_tensors(
    level: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    before_unreadable_page: Callable[[Tensor], Tensor],
) -> None:
    T, M, H = shape
    adapter = random_adapter(M, H, dtype=weights_dtype)
    keys = random_keys(T, M, dtype=dtype)
    guarded = AdapterWeights(*(before_unreadable_page(part) for part in adapter))
    found = gated_adapter(before_unreadable_page(keys), guarded, tau=0.5)
    assert torch.equal(found, gated_adapter(keys, adapter, tau=0.5))


@pytest.mark.parametrize("T", [1, 5, 40])
def test_many_gates_at_once_are_the_gates_one_by_one(level: str, T: int) -> None:
    adapters = [random_adapter(64, 3 + seed % 5, seed=seed) for seed in range(30)]
    keys = random_keys(T, 64)
    bounds = [0.5, 0.9, 0.8] * 10
    current = keys
    for adapter, tau in zip(adapters, bounds, strict=True):
        current = gated_adapter(current, adapter, tau=tau)
    found = gated_adapter(keys, adapters, tau=bounds)
    assert not torch.equal(found, keys)
    if level == "reference":  # torch's own products round differently for some rows alone
        torch.testing.assert_close(found, current, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, current)
    for compose in COMPOSITIONS:
        assert torch.equal(gated_adapter(keys, adapters, tau=1 - 1e-6, compose=compose), keys)


@pytest.mark.skipif(not machine_has("avx512_bf16"), reason="needs the native module and a processor with AVX-512 BF16")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_in_bfloat16(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that machines with a fast instruction choose, asked for by name."""
    T, M, H = shape
    monkeypatch.delenv("REP_FAST_ISA", raising=False)
    module = native.find().module
    assert module is not None
    adapter = random_adapter(M, H, dtype=torch.bfloat16)
    keys = random_keys(T, M, dtype=torch.bfloat16)
    weights = [adapter.w1, adapter.b1.float(), adapter.w2.float(), adapter.b2.float()]
    logits, threaded = torch.empty(1, T), torch.empty(1, T)
    in_bf16 = 2
    assert module.gate_logits(keys, weights, [0.0], logits, native.level(module), 1, in_bf16)[0]
    module.gate_logits(keys, weights, [0.0], threaded, native.level(module), 3, in_bf16)
    assert torch.equal(logits, threaded)
    error = (logits[0].double() - reference.gate_logits(keys, adapter)).abs()
    assert bool((error <= logit_bound(keys, adapter)).all())
    with pytest.raises(ValueError, match="products in bfloat16 need"):
        module.gate_logits(keys.float(), weights, [0.0], logits, native.level(module), 1, in_bf16)


@pytest.mark.parametrize("M", [1, 5])
def test_gelu_over_its_range(level: str, M: int) -> None:
    """H = 1, w₁ = 1: the logit is GELU(k) itself, within 6·2⁻²⁴ of |k|."""
    x = torch.cat([torch.linspace(-14, 14, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30])])
    keys = torch.zeros(len(x), M)
    keys[:, 0] = x
    zero, one = torch.zeros(1), torch.ones(1)
    adapter = AdapterWeights(torch.zeros(1, M), torch.zeros(M, 1), torch.ones(1, M), zero, one, zero)
    found = gate_logits(keys, adapter)
    wanted = torch.nn.functional.gelu(x.double())
    assert bool(((found.double() - wanted).abs() <= 6 * 2.0**-24 * x.double().abs()).all())


def test_padded_rows_and_columns(level: str) -> None:
    adapter = random_adapter(40, 9)
    padded = torch.randn(22, 64)
    keys = padded[::2, 7:47]
    dense = keys.contiguous()
    assert torch.equal(gated_adapter(keys, adapter, tau=0.5), gated_adapter(dense, adapter, tau=0.5))
    transposed = dense.T.contiguous().T
    assert torch.equal(gated_adapter(transposed, adapter, tau=0.5), gated_adapter(dense, adapter, tau=0.5))


def test_soft_gate_is_the_formula_and_differentiates() -> None:
    adapter = random_adapter(6, 3, r=2, dtype=torch.float64)
    keys = random_keys(4, 6, dtype=torch.float64)
    found = gated_adapter(keys, adapter, gate="soft")
    wanted = reference.gated_adapter(keys, [adapter], tau=[0.9], gate="soft")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    leaves = [tensor.clone().requires_grad_() for tensor in (keys, *adapter)]
    assert torch.autograd.gradcheck(lambda k, *w: gated_adapter(k, AdapterWeights(*w), gate="soft"), leaves)


@pytest.mark.parametrize("compose", COMPOSITIONS)
def test_hard_gate_passes_gradients_with_the_decisions_held(compose: str) -> None:
    adapters = [random_adapter(6, 3, r=2, dtype=torch.float64, seed=seed) for seed in range(2)]
    keys = random_keys(5, 6, dtype=torch.float64)
    moving = [keys, adapters[0].a, adapters[0].b, adapters[1].a, adapters[1].b]
    leaves = [tensor.clone().requires_grad_() for tensor in moving]

    def run(k: Tensor, a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor) -> Tensor:
        both = [adapters[0]._replace(a=a0, b=b0), adapters[1]._replace(a=a1, b=b1)]
        return gated_adapter(k, both, tau=0.5, compose=compose)

    assert bool((run(*leaves) != keys).any())
    assert torch.autograd.gradcheck(run, leaves)


def test_bfloat16_gradient_reaches_the_keys() -> None:
    keys = random_keys(3, 8, dtype=torch.bfloat16).requires_grad_()
    gated_adapter(keys, random_adapter(8, 3), tau=0.0).float().sum().backward()
    assert keys.grad is not None
    assert keys.grad.dtype == torch.bfloat16


def test_nonfinite_logits_are_named(level: str) -> None:
    adapter = random_adapter(8, 3)
    keys = random_keys(5, 8)
    keys[3, 2] = math.nan
    assert bool(gate_logits(keys, adapter)[3].isnan())
    if level == "cuda-on-cpu":  # nothing is read back from a GPU: such a gate is shut, and the others' rows are theirs
        found, others = gated_adapter(keys, adapter), torch.tensor([0, 1, 2, 4])
        assert torch.equal(found[3].nan_to_num(), keys[3].nan_to_num())
        assert torch.equal(found[others], gated_adapter(torch.where(keys.isnan(), 0.0, keys), adapter)[others])
        return
    with pytest.raises(NonFiniteError, match="row 3 is nan"):
        gated_adapter(keys, adapter)


def test_profile_counts_the_gates() -> None:
    with profile() as calls:
        gated_adapter(random_keys(5, 8), [random_adapter(8, 3), random_adapter(8, 4)])
    assert calls[0].flops == 2 * 5 * 8 * (3 + 4)


@pytest.mark.parametrize("compose", COMPOSITIONS)
def test_opcheck(compose: str) -> None:
    weights = [tensor for seed in range(2) for tensor in random_adapter(8, 3, seed=seed)]
    arguments = (random_keys(4, 8), weights, [0.0, 0.1], compose)
    torch.library.opcheck(torch.ops.rep_fast.gated_adapter.default, arguments)
    torch.library.opcheck(torch.ops.rep_fast.gate_logits.default, (random_keys(4, 8), weights[:6]))
    leaf = random_keys(4, 8).requires_grad_()
    torch.library.opcheck(torch.ops.rep_fast.gated_adapter.default, (leaf, *arguments[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": torch.zeros(8)}, r"keys must be \(tokens, width\)"),
        ({"keys": torch.zeros(2, 0)}, r"got \(2, 0\)"),
        ({"keys": torch.zeros(2, 8, dtype=torch.int64)}, "int64"),
        ({"keys": torch.zeros(2, 9)}, r"a of adapter 0 must be \(3, 9\) for keys of width 9, got \(3, 8\)"),
        ({"adapters": []}, "no adapter given"),
        ({"adapters": random_adapter(8, 3)._replace(b2=torch.zeros(2))}, r"b2 of adapter 0 must be \(1,\)"),
        (
            {"adapters": random_adapter(8, 3)._replace(w2=torch.zeros(3).double())},
            "w2 of adapter 0 .*torch.float64",
        ),
        ({"tau": 1.5}, r"tau must lie in \[0, 1\], got 1.5"),
        ({"tau": float("nan")}, "got nan"),
        ({"tau": [0.5, 0.5]}, "2 values of tau for 1 adapters"),
        ({"gate": "open"}, "gate must be one of hard, soft, got 'open'"),
        ({"compose": "mean"}, "compose must be one of chain, argmax, sum, got 'mean'"),
        ({"gate": "soft", "adapters": [random_adapter(8, 3)] * 2}, "soft gate takes one adapter, got 2"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"keys": torch.zeros(2, 8), "adapters": random_adapter(8, 3), **options}
    with pytest.raises(HparamError, match=message):
        gated_adapter(arguments.pop("keys"), arguments.pop("adapters"), **arguments)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_float64_chains_go_on_to_gates_that_need_no_logit(tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8), (8, 2), (5, 8), (5,), (5,), (1,))
    first, second = (
        AdapterWeights(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes))
        for _ in range(2)
    )
    keys = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    first.b2.fill_(1000.0)  # opens for every key
    adapted = gated_adapter(keys, [first, second], tau=[0.5, tau])
    moved = keys + keys @ first.a.T @ first.b.T
    wanted = moved if tau == 1.0 else moved + moved @ second.a.T @ second.b.T
    torch.testing.assert_close(adapted, wanted, rtol=1e-12, atol=1e-12)
