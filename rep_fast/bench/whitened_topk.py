"""The collision scan beside what one would write without it: product and top-k in torch, NumPy, faiss."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rep_fast.bench.cases import SCAN_CASES, ScanCase
from rep_fast.bench.interleaved import Provider
from rep_fast.ops import LastTokenExclusion, native, whitened_topk
from rep_fast.ops.topk_state import PASSES

CASES = SCAN_CASES
_SEQUENCE = 256  # tokens per document
_VOCABULARY = 32000
_ROTATED = 64  # coordinates that are mixed with each other
_CHUNK = 2048  # keys a peer multiplies at once: its scores stay in the cache


class Unmasked(NamedTuple):
    """ids [S, k] of a peer, which excludes nothing."""

    ids: Tensor


@dataclass(frozen=True)
class Inputs:
    """keys [N, M] bfloat16, queries [S, M] float32, the exclusion rule; the exact ids [S, k] under it (answer) and
    without it (unmasked)."""

    case: ScanCase
    keys: Tensor
    queries: Tensor
    exclusion: LastTokenExclusion
    answer: Tensor
    unmasked: Tensor

    @classmethod
    def draw(cls, case: ScanCase, *, seed: int) -> Inputs:
        """Normal numbers of the case's κ_h, fresh for each seed; token ids spread over a vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(case.n_keys, case.key_dim, generator=generator)
        queries = torch.randn(case.n_queries, case.key_dim, generator=generator)
        if case.kappa > 1:
            keys, queries = _conditioned(keys, queries, case.kappa, generator)
        keys = keys.bfloat16()
        exclusion = LastTokenExclusion(
            torch.randint(_VOCABULARY, (case.n_keys,), generator=generator),
            torch.arange(0, case.n_keys, _SEQUENCE),
            torch.randint(_VOCABULARY, (case.n_queries,), generator=generator),
        )
        answers = [
            whitened_topk(keys, queries, case.k, exclusion=rule, precision="fp64").ids for rule in (exclusion, None)
        ]
        return cls(case, keys, queries, exclusion, *answers)

    def is_exact(self, found: Tensor | Unmasked) -> bool:
        """Whether the ids are those of the float64 scan, in order."""
        if isinstance(found, Unmasked):
            return torch.equal(found.ids, self.unmasked)
        return torch.equal(found, self.answer)


def _conditioned(keys: Tensor, queries: Tensor, kappa: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys whose second moment has this κ_h, and whitened queries: √Λ z and z/√Λ in a rotated basis.

    Eigenvalues are spread evenly over the logarithms of [e⁻ᵃ, eᵃ], for which κ_h = sinh(a)/a, in each block of 64
    coordinates, and each block is rotated, so that no scaling of columns undoes it.
    """
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.sinh(middle) < kappa * middle else (low, middle)
    roots = torch.linspace(-low / 2, low / 2, _ROTATED).exp()
    basis = torch.linalg.qr(torch.randn(_ROTATED, _ROTATED, generator=generator)).Q
    blocks = [matrix.view(len(matrix), -1, _ROTATED) for matrix in (keys, queries)]
    mixed = ((blocks[0] * roots) @ basis, (blocks[1] / roots) @ basis)
    return mixed[0].view(keys.shape), mixed[1].view(queries.shape)


def providers(inputs: Inputs) -> list[Provider]:
    """Ours at every level of the machine and every pass it has, then the peers that are installed.

    Peers mask nothing: the exclusion that ours applies costs them a matrix of the scores' size more.
    """
    return [*_ours(inputs), *_peers(inputs)]


def _ours(inputs: Inputs) -> list[Provider]:
    module = native.find().module
    if module is None:
        return []
    found = []
    for name in native.levels(module):
        passes = ["fp32"] if name != "avx512_bf16" else ["bf16", "int8", "auto"]
        for precision in passes:
            dtype = _chosen_pass(inputs) if precision == "auto" else precision
            found.append(Provider(f"rep_fast {name} {precision}", dtype, _scan(inputs, precision), True, name))
    return found[1:] if len(found) > 1 else found  # the portable body only where there is nothing else


def _chosen_pass(inputs: Inputs) -> str:
    """Whose ceiling "auto" is to be compared with: the pass that most of the keys go through."""
    counts = whitened_topk(inputs.keys, inputs.queries, inputs.case.k, exclusion=inputs.exclusion).pass_counts
    return PASSES[counts.index(max(counts))].removesuffix("x2")


def _scan(inputs: Inputs, precision: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        return whitened_topk(
            inputs.keys, inputs.queries, inputs.case.k, exclusion=inputs.exclusion, precision=precision
        ).ids

    return run


def _peers(inputs: Inputs) -> list[Provider]:
    found = [
        Provider("torch bfloat16 matmul + topk", "bf16", partial(_torch_scan, inputs, torch.bfloat16)),
        Provider("torch float32 matmul + topk", "fp32", partial(_torch_scan, inputs, torch.float32)),
        Provider("numpy float32 matmul + argpartition", "fp32", partial(_numpy_scan, inputs)),
    ]
    if importlib.util.find_spec("faiss") is not None:
        found.append(Provider("faiss IndexFlatIP", "fp32", _faiss_scan(inputs)))
    if importlib.util.find_spec("usearch") is not None:
        found.append(Provider("usearch exact search", "fp32", _usearch_scan(inputs)))
    return found


def _torch_scan(inputs: Inputs, dtype: torch.dtype) -> Unmasked:
    """Block by block, keeping the best k of each block with those before."""
    queries, k = inputs.queries.to(dtype).T.contiguous(), inputs.case.k
    best = torch.full((k, inputs.case.n_queries), -torch.inf)
    ids = torch.full((k, inputs.case.n_queries), -1)
    for begin in range(0, inputs.case.n_keys, _CHUNK):
        scores = inputs.keys[begin : begin + _CHUNK].to(dtype) @ queries
        top = scores.topk(min(k, len(scores)), dim=0)
        both = torch.cat([best, top.values.float()]).topk(k, dim=0)
        ids = torch.cat([ids, top.indices + begin]).gather(0, both.indices)
        best = both.values
    return Unmasked(ids.T.contiguous())


def _numpy_scan(inputs: Inputs) -> Unmasked:
    queries, k = inputs.queries.numpy(), inputs.case.k
    best = np.full((inputs.case.n_queries, k), -np.inf, dtype=np.float32)
    ids = np.full((inputs.case.n_queries, k), -1)
    for begin in range(0, inputs.case.n_keys, _CHUNK):
        scores = queries @ inputs.keys[begin : begin + _CHUNK].float().numpy().T
        together = np.concatenate([best, scores], axis=1)
        chosen = np.argpartition(-together, k, axis=1)[:, :k]
        best = np.take_along_axis(together, chosen, axis=1)
        here = np.concatenate([ids, np.broadcast_to(np.arange(begin, begin + scores.shape[1]), scores.shape)], axis=1)
        ids = np.take_along_axis(here, chosen, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    return Unmasked(torch.from_numpy(np.take_along_axis(ids, order, axis=1)))


def _faiss_scan(inputs: Inputs) -> Callable[[], Any]:
    """With its threads set to torch's; converting the keys is part of the work.

    Its own OpenBLAS may not know the processor and take a slow path: it is told one that it knows, unless
    `OPENBLAS_CORETYPE` is set already ("" leaves faiss as installed).
    """
    given = os.environ.get("OPENBLAS_CORETYPE")
    if given is None:
        os.environ["OPENBLAS_CORETYPE"] = {"AVX512": "SkylakeX"}.get(torch.backends.cpu.get_cpu_capability(), "Haswell")
    import faiss

    if given is None:
        os.environ.pop("OPENBLAS_CORETYPE", None)

    def run() -> Unmasked:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(inputs.case.key_dim)
        index.add(inputs.keys.float().numpy())
        return Unmasked(torch.from_numpy(index.search(inputs.queries.numpy(), inputs.case.k)[1]))

    return run


def _usearch_scan(inputs: Inputs) -> Callable[[], Any]:
    """Brute force over float32, converting the keys as above."""
    from usearch.index import MetricKind, search

    def run() -> Unmasked:
        found = search(
            inputs.keys.float().numpy(),
            inputs.queries.numpy(),
            inputs.case.k,
            MetricKind.IP,
            exact=True,
            threads=torch.get_num_threads(),
        )
        return Unmasked(torch.from_numpy(found.keys.astype(np.int64)))

    return run
