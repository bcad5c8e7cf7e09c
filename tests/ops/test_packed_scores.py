from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, silu

from rep_fast.errors import HparamError, NonFiniteError
from rep_fast.ops import packed_scores
from rep_fast.ops.packed_scores import SCORES
from rep_fast.reference import packed_scores as reference

pytestmark = pytest.mark.filterwarnings("ignore:packed_scores. the plain torch body serves")

# (tokens, D_in, D_out): ones, primes, beside the panel of 48 columns, the 192 of a task and the blocks of 128 tokens
SHAPES = ((1, 1, 1), (1, 5, 7), (2, 47, 49), (63, 13, 48), (65, 96, 17), (127, 7, 191), (129, 97, 193), (257, 3, 50))


def random_pair(T: int, d_in: int, d_out: int, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, d_in, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.randn(T, d_out, dtype=torch.float64, generator=generator).to(dtype)


def zabs_bound(x: Tensor, g: Tensor) -> Tensor:
    """Bound of the float32 error per column: the product's (T + 2)·2⁻²⁴·Σ_t|x_ti/σ_i||g_tj − ḡ_t| and the sum of 48
    absolute values, averaged over i, both times the size of the terms."""
    wide, centred = x.double(), g.double() - g.double().mean(1, keepdim=True)
    sigma = (wide.T @ centred).norm(dim=1) / max(g.shape[1] - 1, 1) ** 0.5
    scaled = torch.where(sigma > 0, wide.abs() / sigma, 0.0)
    terms = (scaled.T @ centred.abs()).mean(0)
    return (x.shape[0] + 2 + 48) * 2.0**-24 * terms + 1e-30


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_float64_equals_the_gradient(score: str, shape: tuple[int, int, int]) -> None:
    x, g = random_pair(*shape)
    weight = torch.randn(shape[1], shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = packed_scores(x, g, score=score, weight_output=x @ weight, input_gradient=g @ weight.T)
    columns, rows = reference.packed_scores(x, g, score=score, weight=weight)
    torch.testing.assert_close(found.columns, columns, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.rows, rows, rtol=1e-9, atol=1e-9)


# one node has no deviation: the test of constant rows has that case
@pytest.mark.parametrize("shape", [*SHAPES[1:], (1, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zabs_within_its_bound(level: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, g = random_pair(*shape, dtype=dtype)
    found = packed_scores(x, g, score="zabs")
    columns, rows = reference.packed_scores(x, g, score="zabs")
    assert bool(((found.columns - columns).abs() <= zabs_bound(x, g)).all())
    assert bool(((found.rows - rows).abs() <= zabs_bound(g, x)).all())


@pytest.mark.parametrize("score", ["sum", "abs_sum", "l2"])
def test_float32_inputs_are_scored_in_float64(score: str) -> None:
    x, g = random_pair(9, 33, 21, dtype=torch.float32)
    columns, rows = reference.packed_scores(x, g, score=score)
    found = packed_scores(x, g, score=score)
    torch.testing.assert_close(found.columns, columns, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.rows, rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", SCORES)
def test_padded_rows(level: str, score: str) -> None:
    x, g = random_pair(30, 60, 55, dtype=torch.float32)
    x, g = x[::2, 3:50], g[::2, 1:52]
    y = torch.ones(15, 51)
    found = packed_scores(x, g, score=score, weight_output=y, nodes="columns")
    dense = packed_scores(x.contiguous(), g.contiguous(), score=score, weight_output=y, nodes="columns")
    assert torch.equal(found.columns, dense.columns)


def test_constant_rows_contribute_nothing(level: str) -> None:
    """σ = 0: one node, equal columns, or no gradient at all."""
    x, g = random_pair(4, 6, 1, dtype=torch.float32)
    assert not packed_scores(x, g, score="zabs").columns.any()
    g = torch.randn(4, 1).expand(4, 9)
    assert not packed_scores(x, g, score="zabs").columns.any()
    for seed in range(9):  # a mean in float64 is mostly another number than all that it is of
        wide, same = random_pair(4, 6, 1, seed=seed)
        assert not packed_scores(wide, same.expand(4, 9), score="zabs").columns.any()
    assert not packed_scores(x, torch.zeros(4, 9), score="zabs").rows.any()
    # row 0 of G is constant over the nodes although neither x nor g is
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    g = torch.tensor([[0.1, 0.2, 0.4], [0.4, 0.3, 0.1]])
    found = packed_scores(x.double(), g.double(), score="zabs").columns
    only = packed_scores(x[:, 1:].double(), g.double(), score="zabs").columns
    torch.testing.assert_close(found, only / 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 1), (65, 49, 95), (129, 5, 48)], ids=str)
def test_reads_nothing_beyond_the_inputs(
    level: str, shape: tuple[int, int, int], before_unreadable_page: Callable[[Tensor], Tensor]
) -> None:
    x, g = random_pair(*shape, dtype=torch.float32)
    guarded = torch.ops.rep_fast.abs_product_sum(before_unreadable_page(x), before_unreadable_page(g))
    want = (x.double().T @ g.double()).abs().sum(0)
    bound = (shape[0] + 48) * 2.0**-24 * (x.double().abs().T @ g.double().abs()).sum(0)
    assert bool(((guarded - want).abs() <= bound).all())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), T=st.integers(1, 9))
def test_order_of_tokens_and_of_nodes(seed: int, T: int) -> None:
    """Permuting the tokens changes nothing, permuting the nodes permutes their scores."""
    x, g = random_pair(T, 9, 11, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, nodes = torch.randperm(T, generator=generator), torch.randperm(11, generator=generator)
    plain = packed_scores(x, g, score="zabs").columns
    torch.testing.assert_close(packed_scores(x[tokens], g[tokens], score="zabs").columns, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed_scores(x, g[:, nodes], score="zabs").columns, plain[nodes], rtol=1e-9, atol=1e-9)


def test_moments_survive_a_mean_far_above_the_deviation(level: str) -> None:
    """|μ| = 1e5·σ: Σ G² − M μ² would lose all digits in float32 and ten in float64."""
    x, g = random_pair(3, 30, 40)
    g = g + 1e5 * torch.ones(3, 1, dtype=torch.float64)
    columns, rows = reference.packed_scores(x, g, score="zabs")
    found = packed_scores(x, g, score="zabs")
    torch.testing.assert_close(found.columns, columns, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.rows, rows, rtol=1e-8, atol=1e-8)


def test_bits_do_not_depend_on_threads(level: str, threads: None) -> None:
    x, g = random_pair(17, 100, 290, dtype=torch.float32)
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(torch.ops.rep_fast.abs_product_sum(x, g))
    if level != "reference":
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_identities_against_autograd_on_an_mlp(score: str, gated: bool) -> None:
    """The weights of a plain and of a gated MLP: hooks' products alone give the scores of autograd's gradients."""
    generator = torch.Generator().manual_seed(3)
    D, M, T = 7, 11, 5
    up, gate = (torch.randn(D, M, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    down = torch.randn(M, D, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(M, dtype=torch.float64, generator=generator)
    x = torch.randn(T, D, dtype=torch.float64, generator=generator).requires_grad_()
    y_up = x @ up
    key = silu(x @ gate) * y_up if gated else gelu(y_up + bias)
    out = key @ down
    loss = (out * torch.randn(T, D, dtype=torch.float64, generator=generator)).sum().tanh()
    g_up, g_key, g_out, w_up, w_down = torch.autograd.grad(loss, (y_up, key, out, up, down))
    K = packed_scores(x.detach(), g_up, score=score, weight_output=y_up.detach(), nodes="columns").columns
    V = packed_scores(key.detach(), g_out, score=score, input_gradient=g_key, nodes="rows").rows
    want_columns = reference.packed_scores(torch.eye(D).double(), w_up, score=score, weight=up.detach())[0]
    want_rows = reference.packed_scores(torch.eye(M).double(), w_down, score=score, weight=down.detach())[1]
    torch.testing.assert_close(K, want_columns, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(V, want_rows, rtol=1e-9, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-20, 1e-3, 1e15]))
def test_zabs_is_free_of_scale(seed: int, scale: float) -> None:
    x, g = random_pair(3, 8, 10, seed=seed)
    plain = packed_scores(x, g, score="zabs")
    scaled = packed_scores(x, g * scale, score="zabs")
    torch.testing.assert_close(plain.columns, scaled.columns, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-41, 1e37])
def test_zabs_of_float32_is_free_of_scale(level: str, scale: float) -> None:
    """Down to subnormal gradients, whose 1/σ is beyond float32."""
    x, g = random_pair(3, 8, 10, dtype=torch.float32)
    g = g * scale
    found = packed_scores(x, g, score="zabs")
    columns, rows = reference.packed_scores(x, g.double() / scale, score="zabs")
    assert bool(((found.columns - columns).abs() <= zabs_bound(x, g.double() / scale)).all())
    assert bool(((found.rows - rows).abs() <= zabs_bound(g.double() / scale, x)).all())


def test_opcheck() -> None:
    x, g = random_pair(3, 5, 7, dtype=torch.float32)
    torch.library.opcheck(torch.ops.rep_fast.abs_product_sum.default, (x, g))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2, 3)), {"score": "max"}, "score must be one of sum, .* got 'max'"),
        ((torch.ones(2, 3), torch.ones(2, 3)), {"score": "sum", "nodes": "all"}, "nodes must be .* got 'all'"),
        ((torch.ones(3), torch.ones(2, 3)), {"score": "sum"}, r"x must be \(tokens, width\)"),
        ((torch.ones(2, 3), torch.ones(2, 3).int()), {"score": "sum"}, "g must be .*int32"),
        ((torch.ones(2, 3), torch.ones(4, 3)), {"score": "sum"}, "agree in tokens and device, got 2"),
        ((torch.ones(2, 3), torch.ones(2, 3)), {"score": "gxw"}, "'gxw' needs weight_output="),
        (
            (torch.ones(2, 3), torch.ones(2, 4)),
            {"score": "gxw", "weight_output": torch.ones(2, 3)},
            r"weight_output must be \(2, 4\)",
        ),
    ],
)
def test_errors(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(HparamError, match=message):
        packed_scores(*arguments, **options)


def test_nonfinite_inputs_are_named() -> None:
    x, g = random_pair(4, 3, 5)
    g[2, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="g holds a NaN or infinity in row 2"):
        packed_scores(x, g, score="sum")


def test_a_side_that_was_not_computed_says_how_to_get_it() -> None:
    x, g = random_pair(4, 3, 5)
    with pytest.raises(HparamError, match="nodes='both' or nodes='rows'"):
        _ = packed_scores(x, g, score="l2", nodes="columns").rows
    with pytest.raises(HparamError, match="pass input_gradient="):
        _ = packed_scores(x, g, score="gxw", weight_output=g).rows
    with pytest.raises(HparamError, match="pass weight_output="):
        _ = packed_scores(x, g, score="gxw", input_gradient=x).columns
