"""The training form of the gate: native gradients against float64, and against numerical ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from rep_fast.ops import AdapterWeights, gate_forward, gate_gradient, gate_logits, gated_adapter

pytestmark = pytest.mark.filterwarnings("ignore:gated_adapter. the plain torch body serves")

EPS = 2.0**-24
# (tokens, width, gate width): ones, primes, beside the panels of 48 and the blocks of 64 tokens
SHAPES = ((1, 1, 1), (2, 47, 49), (63, 96, 5), (65, 49, 48), (130, 17, 97), (7, 770, 51))


def draw(T: int, M: int, H: int, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """keys, w1, b1, w2, b2, and the upstream gradient."""
    generator = torch.Generator().manual_seed(T + M)
    shapes = ((T, M), (H, M), (H,), (H,), (1,), (T,))
    drawn = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    drawn[1] *= M**-0.5
    return tuple(tensor.to(dtype) for tensor in drawn)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_gradients_against_float64(level: str, shape: tuple[int, int, int]) -> None:
    T, M, H = shape
    keys, w1, b1, w2, b2, upstream = draw(T, M, H, dtype=torch.float32)
    logits, hidden = gate_forward(keys, w1, b1, w2, b2)
    if level != "cuda-on-cpu":  # a GPU decides by kernels of its own and trains by torch
        assert torch.equal(logits, gate_logits(keys, AdapterWeights(w1[:1], w1[:1].T, w1, b1, w2, b2)))
    found = gate_gradient(keys, hidden, w2, upstream)

    # from the same hidden layer, so that only the backward pass is measured
    x = hidden.double().requires_grad_()
    (gelu(x) @ w2.double() @ upstream.double()).backward()
    assert x.grad is not None
    # Φ and x·φ are each found to some units of their own size at most 1 and |x|
    size = (upstream.double().abs().unsqueeze(1) * (1 + w2.double().abs())) * (2 + x.detach().abs())
    depth = (T + 16) * EPS
    assert bool(((found.d_hidden.double() - x.grad).abs() <= 16 * EPS * size).all())
    assert bool(((found.w1.double() - x.grad.T @ keys.double()).abs() <= depth * (size.T @ keys.double().abs())).all())
    assert bool(((found.b1.double() - x.grad.sum(0)).abs() <= depth * size.sum(0)).all())
    d_w2 = upstream.double() @ gelu(x.detach())
    assert bool(((found.w2.double() - d_w2).abs() <= depth * size.sum(0)).all())


def test_gradients_do_not_depend_on_threads(level: str, threads: None) -> None:
    keys, w1, b1, w2, b2, upstream = draw(300, 400, 101, dtype=torch.float32)
    _, hidden = gate_forward(keys, w1, b1, w2, b2)
    torch.set_num_threads(1)
    alone = gate_gradient(keys, hidden, w2, upstream)
    torch.set_num_threads(3)
    together = gate_gradient(keys, hidden, w2, upstream)
    if level != "reference":  # torch's own products promise no such thing
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_rows_that_are_padded_or_transposed(level: str) -> None:
    keys, w1, b1, w2, b2, upstream = draw(9, 20, 7, dtype=torch.float32)
    padded = torch.zeros(9, 33)
    padded[:, 5:25] = keys
    plain = gate_forward(keys, w1, b1, w2, b2)
    for view in (padded[:, 5:25], keys.T.contiguous().T):
        logits, hidden = gate_forward(view, w1.T.contiguous().T, b1, w2, b2)
        torch.testing.assert_close(logits, plain[0], rtol=1e-6, atol=1e-6)
        found = gate_gradient(view, hidden, w2, upstream)
        wanted = gate_gradient(keys, plain[1], w2, upstream)
        torch.testing.assert_close(found.w1, wanted.w1, rtol=1e-6, atol=1e-6)


def test_no_tokens(level: str) -> None:
    keys, w1, b1, w2, b2, upstream = draw(0, 5, 3, dtype=torch.float32)
    logits, hidden = gate_forward(keys, w1, b1, w2, b2)
    found = gate_gradient(keys, hidden, w2, upstream)
    assert logits.shape == (0,)
    assert torch.equal(found.w1, torch.zeros(3, 5))
    assert torch.equal(found.b1, torch.zeros(3))
    assert torch.equal(found.w2, torch.zeros(3))


def test_gradcheck() -> None:
    *leaves, _ = (tensor.requires_grad_() for tensor in draw(4, 6, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *parts: gate_forward(*parts)[0], leaves)


def test_gate_logits_differentiate() -> None:
    *leaves, _ = (tensor.requires_grad_() for tensor in draw(2, 6, 3, dtype=torch.float64))
    a = torch.zeros(1, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda k, *w: gate_logits(k, AdapterWeights(a, a.T, *w)), leaves)


def test_autograd_uses_the_native_gradient(level: str) -> None:
    """The soft gate's gradients in float32 beside those in float64: keys' gradient included."""
    T, M, H, r = 12, 60, 9, 4
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    parts = [leaf(T, M) * M**0.5, leaf(r, M), leaf(M, r), leaf(H, M), leaf(H), leaf(H), leaf(1)]
    gradients = []
    for dtype in (torch.float32, torch.float64):
        keys, *weights = (part.to(dtype).requires_grad_() for part in parts)
        moved = gated_adapter(keys, AdapterWeights(*weights), gate="soft")
        gradients.append(torch.autograd.grad(moved.square().sum(), [keys, *weights]))
    for narrow, wide in zip(*gradients, strict=True):
        # sums of at most T·M products of numbers near 1 over two layers
        assert float((narrow.double() - wide).abs().max()) <= (M + T) * EPS * float(1 + wide.abs().max()) * 8


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float64):
        keys, w1, b1, w2, b2, upstream = draw(4, 6, 3, dtype=dtype)
        leaves = tuple(tensor.requires_grad_() for tensor in (keys, w1, b1, w2, b2))
        torch.library.opcheck(torch.ops.rep_fast.gate_forward.default, leaves)
        hidden = torch.randn(4, 3, dtype=dtype)
        torch.library.opcheck(torch.ops.rep_fast.gate_gradient.default, (keys.detach(), hidden, w2.detach(), upstream))
