"""The gated adapter on a GPU: a few tokens by the kernels alone, many with the library's products, pieces of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from cuda_bodies import needs_gpu, serve_by_executor
from gate_checks import EPS, KEY_DTYPES, as_bits, logit_bound, random_adapter, random_keys, rows_with_clear_gates
from torch import Tensor

from rep_fast.ops import AdapterWeights, gate_logits, gated_adapter, gates_on_gpu, profile
from rep_fast.ops.gated_adapter import COMPOSITIONS
from rep_fast.reference import gated_adapter as reference

# (tokens, width, gate width): ones, primes, beside the tiles of 8 tokens and 4 or 8 rows, several pieces
SHAPES = ((1, 515, 9), (2, 47, 3), (9, 131, 8), (33, 64, 17))


@pytest.fixture(params=["cuda", "cuda-on-cpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where tensors lie that the CUDA body serves."""
    if request.param == "cuda":
        needs_gpu()
        return torch.device("cuda")
    serve_by_executor(monkeypatch, "gated_adapter")
    return torch.device("cpu")


@pytest.fixture(params=["own products", "library products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose products decide the gates; in pieces of 16 tokens."""
    monkeypatch.setattr(gates_on_gpu, "_FEW_TOKENS", 16 if request.param == "own products" else 0)
    monkeypatch.setattr(gates_on_gpu, "_TOKENS_OF_ONE_ADAPTER", 16)
    monkeypatch.setattr(gates_on_gpu, "_TOKENS_OF_SEVERAL", 16)
    return request.param


def moved(adapters: Sequence[AdapterWeights], device: torch.device) -> list[AdapterWeights]:
    return [AdapterWeights(*(part.to(device) for part in adapter)) for adapter in adapters]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_logits_against_float64(
    device: torch.device,
    products: str,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    shape: tuple[int, int, int],
) -> None:
    T, M, H = shape
    adapter, keys = random_adapter(M, H, dtype=weights_dtype), random_keys(T, M, dtype=dtype)
    found = gate_logits(keys.to(device), moved([adapter], device)[0]).cpu()
    assert found.dtype == torch.float32
    error = (found.double() - reference.gate_logits(keys, adapter)).abs()
    assert bool((error <= logit_bound(keys, adapter)).all())


@pytest.mark.parametrize("compose", COMPOSITIONS)
@pytest.mark.parametrize("dtype", KEY_DTYPES, ids=str)
def test_compositions_against_the_reference(
    device: torch.device, products: str, dtype: torch.dtype, compose: str
) -> None:
    tau = [0.5, 0.3, 0.7, 0.4]
    adapters = [random_adapter(53, 7, seed=seed) for seed in range(4)]
    keys = random_keys(40, 53, dtype=dtype)
    found = gated_adapter(keys.to(device), moved(adapters, device), tau=tau, compose=compose).cpu()
    wanted = reference.gated_adapter(keys, adapters, tau=tau, compose=compose)
    assert found.dtype == dtype
    clear = rows_with_clear_gates(keys, adapters, tau, compose)
    assert int(clear.sum()) > 30
    error = (found.double() - wanted).abs()[clear]
    assert bool((error <= EPS[dtype] * wanted[clear].abs() + 1e-4).all())
    shut = (wanted == keys.double()).all(dim=1) & clear
    assert 0 < int(shut.sum()) < 40
    assert torch.equal(as_bits(found[shut]), as_bits(keys[shut]))


def test_the_gates_that_were_open_are_told(device: torch.device, products: str) -> None:
    adapters = [random_adapter(20, 5, seed=seed) for seed in range(3)]
    keys = random_keys(23, 20)
    logits = torch.stack([reference.gate_logits(keys, adapter) for adapter in adapters])
    assert float(logits.abs().min()) > 1e-4
    weights = [part for adapter in moved(adapters, device) for part in adapter]
    for compose, opened in (("sum", logits > 0), ("argmax", (logits > 0) & (logits == logits.amax(0)))):
        found = torch.ops.rep_fast.gated_adapter(keys.to(device), weights, [0.0] * 3, compose)[1]
        assert torch.equal(found.cpu(), opened)


@pytest.mark.parametrize("compose", COMPOSITIONS)
def test_gates_that_are_always_open_or_shut(device: torch.device, products: str, compose: str) -> None:
    adapters = [random_adapter(30, 6, seed=seed) for seed in range(3)]
    keys = random_keys(20, 30)
    keys[:, 3] = -0.0
    mine = moved(adapters, device)
    found = gated_adapter(keys.to(device), mine, tau=[0.0, 1.0, 0.0], compose=compose).cpu()
    wanted = reference.gated_adapter(keys, adapters, tau=[0.0, 1.0, 0.0], compose=compose)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)
    shut = gated_adapter(keys.to(device), mine, tau=1.0, compose=compose).cpu()
    assert torch.equal(as_bits(shut), as_bits(keys))


@pytest.mark.parametrize("tau", [0.5, 0.9, 1e-6])
def test_a_logit_exactly_at_tau_is_closed(device: torch.device, products: str, tau: float) -> None:
    bound = torch.tensor([math.log(tau / (1 - tau))])
    adapter = random_adapter(8, 3)._replace(w2=torch.zeros(3), b2=bound)
    above = adapter._replace(b2=torch.nextafter(bound, torch.tensor([math.inf])))
    keys = random_keys(3, 8)
    closed, opened = (gated_adapter(keys.to(device), moved([own], device), tau=tau).cpu() for own in (adapter, above))
    assert torch.equal(closed, keys)
    assert not torch.equal(opened, keys)


def test_padded_rows_mixed_dtypes_and_columns(device: torch.device, products: str) -> None:
    first, second = random_adapter(40, 9), random_adapter(40, 5, dtype=torch.bfloat16, seed=1)
    widened = AdapterWeights(*(part.float() for part in second))
    keys = torch.randn(22, 64, generator=torch.Generator().manual_seed(0)).to(device)[::2, 7:47]
    mine = moved([first, second], device)
    want = gated_adapter(keys.contiguous(), moved([first, widened], device), tau=0.5)
    assert not torch.equal(want, keys)
    assert torch.equal(gated_adapter(keys, mine, tau=0.5), want)
    assert torch.equal(gated_adapter(keys.T.contiguous().T, mine, tau=0.5), want)
    padded = torch.zeros(9, 50, device=device)
    padded[:, 4:44] = mine[0].w1
    assert torch.equal(gated_adapter(keys, [mine[0]._replace(w1=padded[:, 4:44]), mine[1]], tau=0.5), want)


def test_many_adapters_and_no_tokens(device: torch.device) -> None:
    adapters = [random_adapter(24, 3 + seed % 3, seed=seed) for seed in range(20)]
    keys = random_keys(5, 24)
    mine = moved(adapters, device)
    one_by_one: Tensor = keys.to(device)
    for adapter in mine:
        one_by_one = gated_adapter(one_by_one, adapter, tau=0.7)
    assert not torch.equal(one_by_one.cpu(), keys)
    assert torch.equal(gated_adapter(keys.to(device), mine, tau=0.7), one_by_one)
    assert gated_adapter(keys[:0].to(device), mine, tau=0.7).shape == (0, 24)


def test_gradients_hold_the_decisions(device: torch.device) -> None:
    adapter, keys = random_adapter(16, 5), random_keys(9, 16)
    mine = moved([adapter], device)[0]
    leaf = keys.to(device).requires_grad_()
    gated_adapter(leaf, mine, tau=0.5).sum().backward()
    opened = (reference.gate_logits(keys, adapter) > 0).double().unsqueeze(1)
    wanted = 1 + opened * (adapter.b.double().sum(0) @ adapter.a.double())
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_profile_names_the_body(device: torch.device) -> None:
    with profile() as calls:
        gated_adapter(random_keys(5, 8).to(device), moved([random_adapter(8, 3)], device))
    assert calls[0].backend.startswith("cuda")


@pytest.mark.parametrize("T", [1, 8, 100])
def test_no_call_waits_and_a_graph_replays_it(T: int) -> None:
    needs_gpu()
    place = torch.device("cuda")
    mine = moved([random_adapter(256, 40, dtype=torch.bfloat16, seed=seed) for seed in range(2)], place)
    keys = random_keys(T, 256, dtype=torch.bfloat16).cuda()
    gated_adapter(keys, mine, tau=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gated_adapter(keys, mine, tau=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gated_adapter(keys, mine, tau=0.5)
    keys.copy_(random_keys(T, 256, dtype=torch.bfloat16, seed=6))
    graph.replay()
    assert torch.equal(recorded, gated_adapter(keys, mine, tau=0.5))


@pytest.mark.parametrize("compose", COMPOSITIONS)
def test_compiled_as_one_graph(device: torch.device, compose: str) -> None:
    """Nothing around the kernels breaks the graph, whatever the number of tokens."""
    mine = moved([random_adapter(24, 5, seed=seed) for seed in range(2)], device)

    def layer(keys: Tensor) -> Tensor:
        return gated_adapter(2 * keys, mine, tau=0.5, compose=compose) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (3, 40):
        keys = random_keys(T, 24, seed=T).to(device)
        assert torch.equal(compiled(keys), layer(keys))


def test_compiled_into_graphs_of_a_gpu() -> None:
    needs_gpu()
    mine = moved([random_adapter(256, 40, dtype=torch.bfloat16, seed=seed) for seed in range(2)], torch.device("cuda"))

    def layer(keys: Tensor) -> Tensor:
        return gated_adapter(2 * keys, mine, tau=0.5) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # recorded at the second call
        keys = random_keys(9, 256, dtype=torch.bfloat16, seed=seed).cuda()
        assert torch.equal(compiled(keys), layer(keys))
