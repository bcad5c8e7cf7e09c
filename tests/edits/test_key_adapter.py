"""KeyAdapter: initial state, gate, order, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from rep_fast.edits import KeyAdapter
from rep_fast.edits.key_adapter import adapted
from rep_fast.errors import HparamError, LayerError, NonFiniteError
from rep_fast.ops.gated_adapter import AdapterWeights

M = 20


def trained(seed: int, *, tau: float = 0.5) -> KeyAdapter:
    """An adapter that moves keys: like an initial one, with B drawn too."""
    adapter = KeyAdapter.initial(M, rank=3, gate_hidden=4, seed=seed, dtype=torch.float64)
    b = torch.randn(M, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return KeyAdapter(adapter.weights._replace(b=b), tau=tau)


def by_hand(keys: torch.Tensor, adapter: KeyAdapter) -> torch.Tensor:
    a, b, w1, b1, w2, b2 = adapter.weights
    gate = torch.sigmoid(torch.nn.functional.gelu(keys @ w1.T + b1) @ w2 + b2)
    return keys + (gate > adapter.tau).unsqueeze(-1) * (keys @ a.T @ b.T)


@pytest.fixture
def keys() -> torch.Tensor:
    return torch.randn(2, 7, M, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_initial_adapter_changes_no_key_even_with_an_open_gate(keys: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.equal(KeyAdapter.initial(M, tau=0.0)(keys.to(dtype)), keys.to(dtype))


def test_initial_sizes_and_bounds() -> None:
    adapter = KeyAdapter.initial(11008, rank=32)
    assert sum(part.numel() for part in adapter.weights) == 12_815_513  # methods §6.1: 12.82 M on LLaMA2
    assert (adapter.width, adapter.rank, adapter.weights.w1.shape[0]) == (11008, 32, 1100)
    for part, fan_in in (("a", 11008), ("w1", 11008), ("b1", 11008), ("w2", 1100), ("b2", 1100)):
        tensor = getattr(adapter.weights, part)
        bound = 1 / math.sqrt(fan_in)
        assert float(tensor.abs().max()) <= bound * (1 + 1e-6)
        if tensor.numel() > 1000:
            assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (KeyAdapter.initial(M, seed=seed).weights for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(one, same, strict=True))
    assert not torch.equal(one.a, other.a)


def test_hard_gate_follows_the_formula(keys: torch.Tensor) -> None:
    adapter = trained(1)
    adapter = KeyAdapter(adapter.weights, tau=float(adapter.gate(keys).mean()))
    opened = adapter.is_open(keys)
    assert opened.any()
    assert not opened.all()
    torch.testing.assert_close(adapter(keys), by_hand(keys, adapter), rtol=1e-9, atol=1e-12)
    assert torch.equal(adapter(keys)[~opened], keys[~opened])


def test_is_open_agrees_with_the_adapter_at_the_threshold_itself(keys: torch.Tensor) -> None:
    weights = trained(1).weights._replace(
        w2=torch.zeros(4, dtype=torch.float64), b2=torch.zeros(1, dtype=torch.float64)
    )
    adapter = KeyAdapter(weights, tau=0.5)  # g = 0.5 = tau for every key: closed, strictly
    assert not adapter.is_open(keys).any()
    assert torch.equal(adapter(keys), keys)


@pytest.mark.parametrize(("tau", "opened"), [(0.0, True), (1.0, False)])
def test_thresholds_at_the_ends(keys: torch.Tensor, tau: float, opened: bool) -> None:
    assert bool((trained(1, tau=tau).is_open(keys) == opened).all())


def test_adapters_act_one_after_another(keys: torch.Tensor) -> None:
    one, two = trained(1, tau=0.45), trained(2, tau=0.45)
    expected = by_hand(by_hand(keys, one), two)
    torch.testing.assert_close(adapted(keys, [one, two]), expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(adapted(keys, [two, one]), expected)


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan")])
def test_tau_out_of_range(tau: float) -> None:
    with pytest.raises(HparamError, match="gate threshold tau"):
        KeyAdapter(trained(1).weights, tau=tau)


@pytest.mark.parametrize("sizes", [{"rank": 0}, {"gate_hidden": 0}, {"width": 0}])
def test_sizes_out_of_range(sizes: dict[str, int]) -> None:
    with pytest.raises(HparamError, match="must be positive"):
        KeyAdapter.initial(**({"width": M} | sizes))


@pytest.mark.parametrize("part", ["b", "w1", "b1", "w2", "b2"])
def test_weights_that_do_not_fit(part: str) -> None:
    weights = trained(1).weights
    with pytest.raises(LayerError, match="adapter weight"):
        KeyAdapter(weights._replace(**{part: torch.zeros(9, 2)}))


@pytest.mark.parametrize(("rank", "hidden", "part"), [(0, 4, "a"), (3, 0, "w1")])
def test_weights_of_rank_or_gate_width_zero(rank: int, hidden: int, part: str) -> None:
    shapes = {"a": (rank, M), "b": (M, rank), "w1": (hidden, M), "b1": (hidden,), "w2": (hidden,), "b2": (1,)}
    with pytest.raises(LayerError, match=rf"adapter weight {part} has shape \(0, {M}\); it must be a matrix"):
        KeyAdapter(AdapterWeights(**{name: torch.zeros(shape) for name, shape in shapes.items()}))


@pytest.mark.parametrize("part", ["a", "w1"])
def test_weights_that_are_no_matrix(part: str) -> None:
    with pytest.raises(LayerError, match=rf"adapter weight {part} has shape \(9,\)"):
        KeyAdapter(trained(1).weights._replace(**{part: torch.zeros(9)}))


def test_weights_with_nan() -> None:
    weights = trained(1).weights
    with pytest.raises(NonFiniteError, match="adapter weight b2 holds NaN"):
        KeyAdapter(weights._replace(b2=torch.tensor([float("nan")], dtype=torch.float64)))
