"""The measuring stages of gpu_check.py, each run as a process of its own: `python benchmarks/gpu_stages.py STAGE`.

A row is printed as soon as it is measured, so that a stage that is stopped loses only what came after.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from rep_fast import api, factworld
from rep_fast.collisions.query import WhitenedQueries
from rep_fast.collisions.scan import ScanState
from rep_fast.collisions.token_blocks import token_blocks
from rep_fast.facts import MemoryText
from rep_fast.models import EditableLM
from rep_fast.ops import (
    AdapterWeights,
    LastTokenExclusion,
    MomentSum,
    ScanQueries,
    SpdSolver,
    TopK,
    accumulate_moment,
    gate_logits,
    gated_adapter,
    packed_scores,
    whitened_topk,
)
from rep_fast.paths.tracing import trace_answers
from rep_fast.stats import SecondMoments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@dataclass(frozen=True)
class Sizes:
    """How large everything is; tests go through the stages with less."""

    product: int = 8192  # rows and columns of the products that give the ceilings
    copied: int = 1 << 30  # numbers
    key_dims: tuple[int, ...] = (4096, 11008)
    subjects: tuple[int, ...] = (100, 400, 2000)
    key_bytes: int = 1 << 32  # of a scan
    checked_keys: int = 3 * 4096  # the fused body leaves the first third to the other
    chunk: int = 16384  # of torch's scan
    small_keys: int = 5000  # of the fused scan under sanitizers
    gate: tuple[int, int] = (11008, 1100)
    gate_tokens: tuple[int, ...] = (1, 16, 64, 512, 4096)
    moment_tokens: int = 16384
    scored: tuple[int, int] = (4096, 11008)  # D_in, D_out
    scored_tokens: tuple[int, ...] = (16, 64, 256)
    model: dict[str, int] = field(default_factory=lambda: dict(SEVEN_B))
    model_dtype: torch.dtype = torch.bfloat16
    model_layer: int = 5
    model_tokens: int = 120_000
    model_subjects: tuple[int, ...] = (400, 20_000)


SIZES = Sizes()


def row(case: str, value: float, unit: str, **rest: float) -> None:
    """Tell gpu_check.py one number."""
    print("ROW " + json.dumps({"case": case, "value": value, "unit": unit, **rest}), flush=True)


def seconds(*runs: Callable[[], Any], rounds: int = 15) -> list[float]:
    """Median device time of each, A, B, A, B …, after three rounds that do not count."""
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 3):
        for run, own in zip(runs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if number >= 3:
                own.append(begin.elapsed_time(end) / 1e3)
    return [statistics.median(own) for own in times]


def bf16_rate() -> float:
    """Operations per second of torch's bfloat16 product with float32 results."""
    n = SIZES.product
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(n, n, device=DEVICE)
    return 2 * n**3 / seconds(lambda: torch.mm(a, b.T, torch.float32, out=out))[0]


def int8_rate() -> float:
    """Operations per second of torch's int8 product."""
    n = SIZES.product
    a, b = (torch.randint(-127, 128, (n, n), device=DEVICE, dtype=torch.int8) for _ in range(2))
    return 2 * n**3 / seconds(lambda: torch._int_mm(a, b.T))[0]


def copy_rate() -> float:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.randn(SIZES.copied, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))[0]


def ceilings() -> None:
    """Copy bandwidth and product rates."""
    row("copy", copy_rate() / 1e9, "GB/s")
    row("bfloat16 product, float32 result", bf16_rate() / 1e12, "TFLOP/s")
    row("int8 product", int8_rate() / 1e12, "TOP/s")
    n = SIZES.product
    x, y = (torch.randn(n, n, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=DEVICE)
    run = lambda: torch._scaled_mm(x, y.T, one, one, out_dtype=torch.bfloat16)  # noqa: E731
    row("float8 product", 2 * n**3 / seconds(run)[0] / 1e12, "TFLOP/s")


def torch_scan(keys: Tensor, queries: Tensor, k: int, mask: Tensor, *, chunk: int) -> Tensor:
    """bfloat16 product, mask and top-k, chunk by chunk: what one would write without the op; inexact."""
    best: Tensor | None = None
    for start in range(0, len(keys), chunk):
        scores = queries @ keys[start : start + chunk].T
        top = scores.masked_fill_(mask[:, start : start + chunk], -torch.inf).topk(k)
        best = top.values if best is None else torch.cat([best, top.values], 1).topk(k).values
    assert best is not None
    return best


@contextmanager
def asked(variable: str, body: str) -> Iterator[None]:
    """Inside, the environment asks for this body of a kernel."""
    before = os.environ.get(variable)
    os.environ[variable] = body
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def scan_by(body: str, *arguments: Any, **options: Any) -> TopK:
    """The scan by one of its bodies, "product" or "fused"."""
    with asked("REP_FAST_GPU_SCAN", body):
        return whitened_topk(*arguments, **options)


def scan_case(n_queries: int, key_dim: int, rates: dict[tuple[str, str], float]) -> None:
    """The scan of a stream that is under way, beside torch's and the rate of the pass's bare product, for each of
    (body, pass) in `rates`."""
    generator = torch.Generator(DEVICE).manual_seed(n_queries)
    n = SIZES.key_bytes // (2 * key_dim)
    keys = torch.randn(n, key_dim, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    queries = torch.randn(n_queries, key_dim, generator=generator, device=DEVICE)
    tokens = torch.randint(32000, (n,), generator=generator, device=DEVICE)
    last = torch.randint(32000, (n_queries,), generator=generator, device=DEVICE)
    rule = LastTokenExclusion(tokens, torch.arange(0, n, 512, device=DEVICE), last)
    kept = ScanQueries(queries)
    before = whitened_topk(keys, kept, 10, exclusion=rule)
    n_checked = SIZES.checked_keys
    part = LastTokenExclusion(tokens[:n_checked], torch.arange(0, n_checked, 512, device=DEVICE), last)
    exact = whitened_topk(keys[:n_checked], queries, 10, exclusion=part, precision="fp64")
    for body, precision in rates:
        found = scan_by(body, keys[:n_checked], queries, 10, exclusion=part, precision=precision)
        assert torch.equal(found.ids, exact.ids), f"{body} {precision} lost a hit"
    mask = torch.zeros(n_queries, n, dtype=torch.bool, device=DEVICE)
    narrow = queries.bfloat16()

    def scan(body: str, precision: str) -> TopK:
        return scan_by(body, keys, kept, 10, exclusion=rule, state=before, first_id=n, precision=precision)

    *ours, peer = seconds(
        *(partial(scan, *way) for way in rates),
        lambda: torch_scan(keys, narrow, 10, mask, chunk=SIZES.chunk),
        rounds=9,
    )
    for own, ((body, precision), rate) in zip(ours, rates.items(), strict=True):
        share = 2 * n * n_queries * key_dim / own / rate
        case = f"{precision} by {body}, {n_queries} subjects, M {key_dim}"
        row(case, 1e3 * own, "ms", peer=1e3 * peer, share=share)


def scan_kernels() -> None:
    """The scan at the shapes of two models, its keys of κ_h = 1: the best case of "int8"."""
    rates = {("product", "bf16"): bf16_rate(), ("product", "int8"): int8_rate()}
    for key_dim in SIZES.key_dims:
        for n_queries in SIZES.subjects:
            scan_case(n_queries, key_dim, rates)


def fused_scan() -> None:
    """Both bodies of the scan side by side: which of them should serve?"""
    if not is_hopper():
        return
    rates = {"bf16": bf16_rate(), "int8": int8_rate()}
    ways = {(body, scan_pass): rate for scan_pass, rate in rates.items() for body in ("product", "fused")}
    for key_dim in SIZES.key_dims:
        for n_queries in SIZES.subjects:
            scan_case(n_queries, key_dim, ways)


def is_hopper() -> bool:
    """Whether the bodies for Hopper run here; told where they do not."""
    is_there = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    if not is_there:
        print("what is measured here needs a GPU of sm_90")
    return is_there


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """The work of `run` recorded once: replays cost no time of the host."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def torch_gate(keys: Tensor, adapter: AdapterWeights) -> Tensor:
    """As a module would do it: the projection of every token, times its decision."""
    hidden = gelu(linear(keys, adapter.w1, adapter.b1))
    gate = torch.sigmoid(linear(hidden, adapter.w2.unsqueeze(0), adapter.b2))
    return keys + (gate > 0.9) * linear(linear(keys, adapter.a), adapter.b)


def gates() -> None:
    """One adapter of LLaMA2-7B's widths per call; eight adapters in a row, so that no W1 is cached."""
    copied = copy_rate()
    for dtype in (torch.bfloat16, torch.float32):
        adapters = [random_adapter(*SIZES.gate, dtype, seed) for seed in range(8)]
        for n_tokens in SIZES.gate_tokens:
            gate_case(n_tokens, adapters, copied)
            if dtype == torch.bfloat16:
                open_case(n_tokens, adapters)


def open_case(n_tokens: int, adapters: list[AdapterWeights]) -> None:
    """What gates cost that open for a token in twenty, one at least: an adapter per call, and all as a chain."""
    keys = torch.randn(n_tokens, SIZES.gate[0], device=DEVICE).bfloat16()
    places = max(n_tokens // 20, 1)
    lowest = [gate_logits(keys, own).topk(places).values[-1].double() for own in adapters]
    taus = [torch.sigmoid(logit - 1e-3).item() for logit in lowest]
    moved = gated_adapter(keys, adapters[0], tau=taus[0])
    assert int((moved != keys).any(dim=1).sum()) >= places, "an open gate moved no key"
    shut, opened, chain = seconds(
        graphed(lambda: [gated_adapter(keys, own, tau=1.0) for own in adapters]),
        graphed(lambda: [gated_adapter(keys, own, tau=tau) for own, tau in zip(adapters, taus, strict=True)]),
        graphed(lambda: gated_adapter(keys, adapters, tau=taus)),
    )
    # the first is what the others are compared with; torch has no column here
    row(f"{n_tokens} tokens, none open (tau = 1)", 1e6 * shut / len(adapters), "µs")
    row(f"{n_tokens} tokens, {places} open", 1e6 * opened / len(adapters), "µs")
    row(f"{n_tokens} tokens, {places} open, chain of {len(adapters)}", 1e6 * chain, "µs")


def gate_case(n_tokens: int, adapters: list[AdapterWeights], copied: float) -> None:
    """Keys of the weights' type; `copied`: bytes per second that memory gives."""
    dtype = adapters[0].w1.dtype
    keys = torch.randn(n_tokens, SIZES.gate[0], device=DEVICE).to(dtype)
    assert all(torch.equal(gated_adapter(keys, own, tau=0.9), keys) for own in adapters), "a shut gate moved a key"
    ours, peer = seconds(
        graphed(lambda: [gated_adapter(keys, own, tau=0.9) for own in adapters]),
        graphed(lambda: [torch_gate(keys, own) for own in adapters]),
    )
    share = sum(own.w1.nbytes for own in adapters) / ours / copied
    case = f"{n_tokens} tokens, {str(dtype).removeprefix('torch.')}"
    per_gate = 1e6 / len(adapters)
    row(case, per_gate * ours, "µs", peer=per_gate * peer, **({"share": share} if n_tokens < 64 else {}))


def moment_by(body: str, total: MomentSum, keys: Tensor, **options: Any) -> MomentSum:
    """Tokens added to a second moment by one of its bodies: "mma", "wgmma128" or "wgmma192"."""
    with asked("REP_FAST_GPU_MOMENT", body):
        return accumulate_moment(total, keys, **options)


def moment_case(key_dim: int, ceiling: float, *bodies: str) -> None:
    """Bodies beside a library product that is then added to a float32 sum, and one that adds as it goes."""
    keys = torch.randn(SIZES.moment_tokens, key_dim, device=DEVICE).bfloat16()
    total = MomentSum.zeros(key_dim, device=DEVICE)
    float32 = torch.zeros(key_dim, key_dim, device=DEVICE)
    want = keys[:, :64].double().T @ keys.double()
    for body in bodies:
        found = moment_by(body, MomentSum.zeros(key_dim, device=DEVICE), keys).lower[:, :64].tril()
        assert torch.allclose(found, want.T.tril(), rtol=1e-4, atol=1.0), body
    *ours, product, addmm = seconds(
        *(partial(moment_by, body, total, keys) for body in bodies),
        lambda: float32.add_(torch.mm(keys.T, keys, out_dtype=torch.float32)),
        lambda: torch.addmm(float32, keys.T, keys, out_dtype=torch.float32),
    )
    case = f"{len(keys)} tokens, M {key_dim}"
    for body, own in zip(bodies, ours, strict=True):
        rate = len(keys) * key_dim * (key_dim + 1) / own
        row(f"{body}, {case}", 1e3 * own, "ms", peer=1e3 * min(product, addmm), share=rate / ceiling)
    row(f"torch product and sum, {case}", 1e3 * product, "ms")
    row(f"torch addmm, {case}", 1e3 * addmm, "ms")


def moment_sums() -> None:
    """Tokens added to a second moment by the body that serves."""
    ceiling = bf16_rate()
    for key_dim in SIZES.key_dims:
        moment_case(key_dim, ceiling, "mma")


def wgmma_moment() -> None:
    """All bodies of the second moment side by side: which of them should serve?"""
    if not is_hopper():
        return
    ceiling = bf16_rate()
    for key_dim in SIZES.key_dims:
        moment_case(key_dim, ceiling, "mma", "wgmma128", "wgmma192")


def scores() -> None:
    """Column scores of LLaMA2-7B's W_in, beside forming the gradient and reducing it."""
    for n_tokens in SIZES.scored_tokens:
        x, g = (torch.randn(n_tokens, width, device=DEVICE) for width in SIZES.scored)

        def ours(x: Tensor = x, g: Tensor = g) -> Tensor:
            return packed_scores(x, g, score="zabs", nodes="columns").columns

        def formed(x: Tensor = x, g: Tensor = g) -> Tensor:
            gradient = x.T @ g
            deviation = gradient.std(1, keepdim=True)
            return gradient.sub_(gradient.mean(1, keepdim=True)).div_(deviation).abs_().mean(0)

        assert torch.allclose(ours().float(), formed(), rtol=1e-3)
        own, peer = seconds(ours, formed)
        row(f"{n_tokens} tokens, {SIZES.scored[0]} × {SIZES.scored[1]}", 1e3 * own, "ms", peer=1e3 * peer)


def random_moment(key_dim: int) -> Tensor:
    """A second moment of 2 M tokens, float32."""
    keys = torch.randn(2 * key_dim, key_dim, device=DEVICE)
    moment = keys.T @ keys / len(keys)
    return (moment + moment.T) / 2


def solves() -> None:
    """Few right-hand sides with a kept factor, beside torch's solve with a float32 and with a float64 factor."""
    for key_dim in SIZES.key_dims:
        moment = random_moment(key_dim)
        solver = SpdSolver.factor(moment)
        narrow, wide = torch.linalg.cholesky(moment), torch.linalg.cholesky(moment.double())
        for n_columns in (1, 64):
            b = torch.randn(key_dim, n_columns, device=DEVICE, dtype=torch.float64)
            found = solver.solve(b, backward_error=1e-13)
            torch.testing.assert_close(found, torch.cholesky_solve(b, wide), rtol=1e-6, atol=1e-8)
            rough, refined, narrow_peer, wide_peer = seconds(
                lambda b=b, own=solver: own.solve_roughly(b),
                lambda b=b, own=solver: own.solve(b, backward_error=1e-13),
                lambda b=b, factor=narrow: torch.cholesky_solve(b.float(), factor),
                lambda b=b, factor=wide: torch.cholesky_solve(b, factor),
            )
            case = f"M {key_dim}, {n_columns} columns"
            row(f"factor alone, {case}", 1e3 * rough, "ms", peer=1e3 * narrow_peer)
            row(f"refined, {case}", 1e3 * refined, "ms", peer=1e3 * wide_peer)


def random_adapter(key_dim: int, gate_hidden: int, dtype: torch.dtype, seed: int) -> AdapterWeights:
    """Weights whose gate stays shut, b₂ being −4."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shapes = ((32, key_dim), (key_dim, 32), (gate_hidden, key_dim), (gate_hidden,), (gate_hidden,))
    drawn = (torch.randn(shape, generator=generator, device=DEVICE) * shape[-1] ** -0.5 for shape in shapes)
    return AdapterWeights(*(part.to(dtype) for part in (*drawn, torch.full((1,), -4.0, device=DEVICE))))


def timed(case: str, run: Callable[[], Any], *, work: int = 0) -> Any:
    """Run twice, report the second: seconds, or `work` per second; and the peak memory."""
    run()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - begin
    row(case, work / elapsed if work else elapsed, "tokens/s" if work else "s")
    if DEVICE == "cuda":
        row(f"{case}: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
    return result


def random_model() -> EditableLM:
    """A LLaMA of this shape with the embedded model's tokenizer; speed needs no knowledge."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = factworld.load().tokenizer
    config = LlamaConfig(vocab_size=32000, bos_token_id=0, eos_token_id=1, pad_token_id=2, **SIZES.model)
    torch.set_default_dtype(SIZES.model_dtype)
    try:
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return EditableLM(model.eval().requires_grad_(False), tokenizer, name="random LLaMA")


def random_queries(n: int, width: int) -> WhitenedQueries:
    generator = torch.Generator().manual_seed(0)
    return WhitenedQueries(
        subjects=tuple(map(str, range(n))),
        whitened=torch.randn(n, width, generator=generator),
        self_similarity=torch.ones(n, dtype=torch.float64),
        last_tokens=torch.randint(1000, (n,), generator=generator),
    )


def end_to_end() -> None:
    """ROME, REP, the scan, moments and tracing on a random model."""
    lm, layer, n_tokens = random_model(), SIZES.model_layer, SIZES.model_tokens
    width = SIZES.model["intermediate_size"]
    documents = [case.fact.text for case in factworld.cases("test")] * 200
    corpus = MemoryText("facts", [" ".join(documents[n : n + 60]) for n in range(0, len(documents), 60)])
    case = factworld.cases("validation")[0]

    answers = [lm.answer(case.fact.text, case.fact.target_new)] * 8
    timed("path tracing, 8 answers", lambda: trace_answers(lm, answers))

    blocks = list(token_blocks(lm, corpus, tokens=n_tokens // 4))
    counted = sum(len(own.token_ids) for own in blocks)
    timed("truncated forward alone", lambda: [lm.keys(own.batch, [layer]) for own in blocks], work=counted)
    for n_queries in SIZES.model_subjects:
        queries = random_queries(n_queries, width)

        def scan_all(queries: WhitenedQueries = queries) -> None:
            state = ScanState(TopK.empty(len(queries.subjects), 10, device=DEVICE))
            for own in blocks:
                keys = lm.keys(own.batch, [layer])[layer].bfloat16()
                state.add(queries, own, keys, window=10, precision="auto")
            state.settle()

        timed(f"collision scan, {n_queries} subjects", scan_all, work=counted)

    layers = list(range(layer - 1, min(layer + 4, SIZES.model["num_hidden_layers"])))
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        moments = SecondMoments.collect(lm, corpus, layers, tokens=n_tokens, cache_dir=place)
        row(f"moments of {len(layers)} layers, {n_tokens} tokens", time.perf_counter() - begin, "s")
    bench = api.Workbench(lm, text=corpus, overrides={"layer": layer})
    bench.use_moments(moments)
    edit = timed("ROME edit, factor kept", lambda: bench.edit(case))
    timed("REP training", lambda: bench.with_rep(edit, case))


STAGES: dict[str, Callable[[], None]] = {
    "ceilings": ceilings,
    "whitened_topk": scan_kernels,
    "fused_scan": fused_scan,
    "gated_adapter": gates,
    "accumulate_moment": moment_sums,
    "wgmma_moment": wgmma_moment,
    "packed_scores": scores,
    "spd_solver": solves,
    "end_to_end": end_to_end,
}

if __name__ == "__main__":
    STAGES[sys.argv[1]]()
