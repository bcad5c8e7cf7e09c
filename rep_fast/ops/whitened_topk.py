"""The collision scan: which corpus tokens have keys that a rank-one edit would hit.

A closed-form edit with key k* adds (kᵀC⁻¹k*)·r/(k*ᵀC⁻¹k*) to the value of every key k, so the tokens it disturbs most
are those of the largest whitened similarity kᵀC⁻¹k*. The scan finds the best k of a stream of keys for many queries at
once, exactly, in memory that does not grow with the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rep_fast.errors import BackendError, HparamError, NonFiniteError
from rep_fast.ops import native
from rep_fast.ops.backend import choose, choose_or_warn
from rep_fast.ops.profile import recorded
from rep_fast.reference import whitened_topk as reference

# how pairs are ruled out, in the order of the native module's numbers
PASSES = ("fp64", "fp32", "bf16", "bf16x2", "int8")
PRECISIONS = ("auto", *PASSES)
NONFINITE = ("raise", "exclude")
_KEY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_STATE_TENSORS = ("counts", "dropped_queries", "exact_scores", "ids", "pass_counts")
_DOT_BODY = "native-avx512_bf16"
_LARGEST_INT8_WIDTH = 65536


@dataclass(frozen=True)
class TopK:
    """The best k hits of each query among the keys seen so far.

    States of disjoint sets of keys merge in any order and grouping to the same bits, so blocks, threads, processes and
    machines combine by `merge`.

    Attributes:
        exact_scores: [S, k] float64, descending; −∞ where there is no hit.
        ids: [S, k] int64; −1 where there is no hit; equal scores stand in the order of their ids.
        n_keys_seen: keys fed in, dropped ones included.
        n_nonfinite: keys dropped for a NaN or infinity (only with nonfinite="exclude").
        dropped_queries: [S] bool, queries left out for a NaN or infinity (only with nonfinite="exclude").
        pass_counts: keys that each of `PASSES` went over; the choice changes the cost, never the hits.
    """

    exact_scores: Tensor
    ids: Tensor
    n_keys_seen: int
    n_nonfinite: int
    dropped_queries: Tensor
    pass_counts: tuple[int, ...] = (0,) * len(PASSES)

    @staticmethod
    def empty(n_queries: int, k: int, *, device: torch.device | str = "cpu") -> TopK:
        """The state before any key: merging it changes nothing.

        Raises:
            HparamError: k < 1 or n_queries < 0.
        """
        if k < 1 or n_queries < 0:
            raise HparamError(f"TopK: needs k >= 1 and n_queries >= 0, got k={k}, n_queries={n_queries}")
        return TopK(
            exact_scores=torch.full((n_queries, k), -torch.inf, dtype=torch.float64, device=device),
            ids=torch.full((n_queries, k), -1, dtype=torch.int64, device=device),
            n_keys_seen=0,
            n_nonfinite=0,
            dropped_queries=torch.zeros(n_queries, dtype=torch.bool, device=device),
        )

    @property
    def k(self) -> int:
        """Hits kept per query."""
        return self.ids.shape[1]

    @property
    def scores(self) -> Tensor:
        """[S, k] float32: the exact scores, rounded once."""
        return self.exact_scores.float()

    def merge(self, other: TopK) -> TopK:
        """The state of both sets of keys together; an id must not occur in both.

        Raises:
            HparamError: the states differ in queries or k.
        """
        if self.ids.shape != other.ids.shape:
            raise HparamError(f"TopK.merge: (queries, k) differ, {tuple(self.ids.shape)} and {tuple(other.ids.shape)}")
        scores, ids = reference.select_best(
            torch.cat([self.exact_scores, other.exact_scores], 1), torch.cat([self.ids, other.ids], 1), self.k
        )
        return TopK(
            exact_scores=scores,
            ids=ids,
            n_keys_seen=self.n_keys_seen + other.n_keys_seen,
            n_nonfinite=self.n_nonfinite + other.n_nonfinite,
            dropped_queries=self.dropped_queries | other.dropped_queries,
            pass_counts=_sums(self.pass_counts, other.pass_counts),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors, for safetensors."""
        return {
            "counts": torch.tensor([self.n_keys_seen, self.n_nonfinite]),
            "dropped_queries": self.dropped_queries,
            "exact_scores": self.exact_scores,
            "ids": self.ids,
            "pass_counts": torch.tensor(self.pass_counts),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> TopK:
        """The state `to_tensors` gave.

        Raises:
            HparamError: a tensor is missing or has another shape or dtype.
        """
        if sorted(tensors) != list(_STATE_TENSORS):
            raise HparamError(f"TopK: needs the tensors {', '.join(_STATE_TENSORS)}, got {', '.join(sorted(tensors))}")
        counts, dropped, scores, ids, passes = (tensors[name] for name in _STATE_TENSORS)
        shapes_fit = scores.dim() == 2 and scores.shape == ids.shape and dropped.shape == scores.shape[:1]
        shapes_fit = shapes_fit and counts.shape == (2,) and passes.shape == (len(PASSES),)
        dtypes = (counts.dtype, dropped.dtype, scores.dtype, ids.dtype, passes.dtype)
        if not shapes_fit or dtypes != (torch.int64, torch.bool, torch.float64, torch.int64, torch.int64):
            described = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(tensors.items()))
            raise HparamError(f"TopK: the tensors do not fit together: {described}")
        n_keys_seen, n_nonfinite = counts.tolist()
        return TopK(scores, ids, n_keys_seen, n_nonfinite, dropped, tuple(passes.tolist()))


@dataclass(frozen=True)
class LastTokenExclusion:
    """Leaves out the places where a subject itself is being read.

    Position p is excluded for query i if last_tokens[i] occurs at p, p−1, …, p−window within p's sequence.

    Attributes:
        token_ids: [N] int64, the token of each key of the block.
        sequence_starts: [Q] int64, ascending row numbers at which sequences begin; the first is 0.
        last_tokens: [S] int64, the last token of each query's subject.
        window: how far back the subject's last token counts.
        lookback: [L] int64, the tokens before row 0, oldest first, where the block's first sequence began in the block
            before (`tail` of that block's exclusion); None where it begins here.

    Raises:
        HparamError: a tensor is not a one-dimensional int64 tensor, starts are not ascending from 0, or window < 0.
    """

    token_ids: Tensor
    sequence_starts: Tensor
    last_tokens: Tensor
    window: int = 10
    lookback: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("token_ids", "sequence_starts", "last_tokens", "lookback"):
            _check_int64("LastTokenExclusion", name, getattr(self, name))
        starts = self.sequence_starts
        if starts.numel() == 0 or starts[0] != 0 or bool((starts.diff() <= 0).any()):
            raise HparamError("LastTokenExclusion: sequence_starts must be ascending row numbers, the first of them 0")
        if starts[-1] > max(self.token_ids.numel() - 1, 0):
            raise HparamError(
                f"LastTokenExclusion: sequence_starts reaches row {int(starts[-1])}, "
                f"but there are {self.token_ids.numel()} tokens"
            )
        if self.window < 0:
            raise HparamError(f"LastTokenExclusion: window must be at least 0, got {self.window}")

    def tail(self) -> Tensor:
        """Lookback for the next block, where that one continues this block's last sequence: at most `window` tokens."""
        start = int(self.sequence_starts[-1])
        tokens = self.token_ids[start:]
        if start == 0 and self.lookback is not None:
            tokens = torch.cat([self.lookback, tokens])
        return tokens[max(tokens.numel() - self.window, 0) :].clone()

    def check_fits(self, n_keys: int, n_queries: int) -> None:
        """Raise HparamError unless there is a token per key and a last token per query."""
        if (self.token_ids.numel(), self.last_tokens.numel()) != (n_keys, n_queries):
            raise HparamError(
                f"whitened_topk: exclusion has {self.token_ids.numel()} tokens and {self.last_tokens.numel()} last "
                f"tokens, but there are {n_keys} keys and {n_queries} queries"
            )

    def arguments(self) -> dict[str, Any]:
        """This rule as arguments of the custom op."""
        return {
            "token_ids": self.token_ids,
            "sequence_starts": self.sequence_starts,
            "last_tokens": self.last_tokens,
            "lookback": self.lookback,
            "window": self.window,
        }


@dataclass(frozen=True)
class PairExclusion:
    """Leaves out listed pairs: row p for the queries subjects[indptr[p]:indptr[p + 1]] (CSR over the block's rows).

    Attributes:
        indptr: [N + 1] int64, from 0, not descending, ending at nnz. subjects: [nnz] int64 query numbers.

    Raises:
        HparamError: a tensor is not a one-dimensional int64 tensor, or indptr is no CSR pointer of `subjects`.
    """

    indptr: Tensor
    subjects: Tensor

    def __post_init__(self) -> None:
        for name in ("indptr", "subjects"):
            _check_int64("PairExclusion", name, getattr(self, name))
        pointer = self.indptr
        nnz = self.subjects.numel()
        if pointer.numel() == 0 or pointer[0] != 0 or pointer[-1] != nnz or bool((pointer.diff() < 0).any()):
            raise HparamError(f"PairExclusion: indptr must run from 0 to {nnz}, the number of subjects, not descending")

    def check_fits(self, n_keys: int, n_queries: int) -> None:
        """Raise HparamError unless there is a list per key and every listed query exists."""
        if self.indptr.numel() != n_keys + 1:
            raise HparamError(
                f"whitened_topk: exclusion has {self.indptr.numel() - 1} rows, but there are {n_keys} keys"
            )
        if self.subjects.numel() and not 0 <= int(self.subjects.min()) <= int(self.subjects.max()) < n_queries:
            raise HparamError(
                f"whitened_topk: exclusion lists query {int(self.subjects.max())} or a negative one, "
                f"but there are {n_queries} queries"
            )

    def arguments(self) -> dict[str, Any]:
        """This rule as arguments of the custom op."""
        return {"indptr": self.indptr, "subjects": self.subjects}


def whitened_topk(
    keys: Tensor,
    queries: Tensor,
    k: int,
    *,
    exclusion: LastTokenExclusion | PairExclusion | None = None,
    state: TopK | None = None,
    first_id: int = 0,
    precision: str = "auto",
    nonfinite: str = "raise",
    delta: float = 1e-9,
    seed: int = 0,
) -> TopK:
    """Best `k` keys for each whitened query, by inner product, added to a running state.

    score[i, j] = keys[j] · queries[i] with queries[i] = C⁻¹k*_i, the whitened similarity of a key and an edit.
    The result is the float64 answer on the numbers as stored: a fast pass only rules pairs out, by a proven bound on
    its own error, and what remains is scored in float64. It has the same bits for any number of threads, any cut of the
    stream into blocks and any instruction set.

    Args:
        keys: [N, M] bfloat16, float16 or float32, a block of the stream; rows may be padded, columns contiguous.
        queries: [S, M] float32, already whitened, same device; rows may be padded.
        k: hits per query, k >= 1.
        exclusion: pairs that must not be hits; looked at only for pairs that would be.
        state: the result for the blocks before; not changed.
        first_id: id of row 0 of this block, >= 0; ids of blocks must not overlap.
        precision: the pass that rules pairs out; the hits are the same, at another cost. "fp64" scores every pair in
            float64, "fp32" multiplies in float32, "bf16" in bfloat16 with the queries rounded once, "bf16x2" with their
            high and low halves (bfloat16 keys and AVX-512 BF16), "int8" in integers, both sides rounded with a random
            dither (AVX-512 VNNI). "auto" takes the fastest on this processor whose error bound, on a sample, lets
            little more through than must be; int8 gives way to the next one when more than 2 % of the pairs come
            through after all. `TopK.pass_counts` tells what ran.
        nonfinite: "raise", or "exclude" to leave out and count rows with a NaN or infinity.
        delta: probability, over the draw of the int8 pass's dither, that its bound fails for any pair of a scan of up
            to 2⁴⁰ keys; the other passes' bounds hold always.
        seed: of the dither, in [0, 2⁶³). Keys must not be built from it.
    Returns:
        TopK: scores descending, ties by the lower id; score −∞ and id −1 where there are fewer than k hits.
    Raises:
        HparamError: shapes, dtypes, layouts, devices or options do not fit.
        NonFiniteError: a NaN or infinity in keys or queries; the message names the first row.
        BackendError: `REP_FAST_ISA` names no instruction set, or the pass asked for has no body for these keys here.
    Cost: one pass over `keys`, 2·N·S·M floating-point operations; memory O(S·(k + M)).
    """
    _check_options(k, first_id, precision, nonfinite, delta, seed)
    _check_matrices(keys, queries)
    before = TopK.empty(queries.shape[0], k, device=queries.device) if state is None else state
    if exclusion is not None:
        exclusion.check_fits(keys.shape[0], queries.shape[0])
    if before.k != k:
        raise HparamError(f"whitened_topk: the state keeps k={before.k} hits, asked for k={k}")
    arguments = {**_NO_EXCLUSION, **(exclusion.arguments() if exclusion is not None else {})}
    work = {
        "flops": 2 * keys.shape[0] * queries.shape[0] * keys.shape[1],
        "bytes": keys.numel() * keys.element_size() + queries.numel() * 4 + 2 * before.ids.numel() * 16,
    }
    body = choose("whitened_topk", keys.device).name
    _check_pass(precision, keys, body)
    with recorded("whitened_topk", body, **work):
        scores, ids, dropped, counts = torch.ops.rep_fast.whitened_topk(
            keys,
            queries,
            before.exact_scores,
            before.ids,
            first_id=first_id,
            precision=precision,
            delta=delta,
            seed=seed,
            **arguments,
        )
    n_nonfinite, first_nonfinite, _, *passes = counts.tolist()
    if nonfinite == "raise":
        _check_finite(n_nonfinite, first_nonfinite, first_id, dropped)
    return TopK(
        exact_scores=scores,
        ids=ids,
        n_keys_seen=before.n_keys_seen + keys.shape[0],
        n_nonfinite=before.n_nonfinite + n_nonfinite,
        dropped_queries=before.dropped_queries | dropped,
        pass_counts=_sums(before.pass_counts, passes),
    )


_NO_EXCLUSION = dict.fromkeys(
    ("token_ids", "sequence_starts", "last_tokens", "lookback", "indptr", "subjects"), None
) | {"window": 0}


@torch.library.custom_op("rep_fast::whitened_topk", mutates_args=())
def _whitened_topk(
    keys: Tensor,
    queries: Tensor,
    scores: Tensor,
    ids: Tensor,
    first_id: int,
    token_ids: Tensor | None,
    sequence_starts: Tensor | None,
    last_tokens: Tensor | None,
    lookback: Tensor | None,
    window: int,
    indptr: Tensor | None,
    subjects: Tensor | None,
    precision: str,
    delta: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Functional door over plain tensors: (scores, ids, dropped queries, counts of `_outputs`)."""
    rules: dict[str, Any] = {
        "token_ids": token_ids,
        "sequence_starts": sequence_starts,
        "last_tokens": last_tokens,
        "lookback": lookback,
        "window": window,
        "indptr": indptr,
        "subjects": subjects,
    }
    new_scores, new_ids, dropped, counts = _outputs(
        keys, queries, scores, ids, first_id=first_id, precision=precision, delta=delta, seed=seed, **rules
    )
    chosen = choose_or_warn("whitened_topk", keys.device)
    if chosen.module is None:
        return reference.whitened_topk(keys, queries, scores, ids, first_id=first_id, **rules)
    report = chosen.module.whitened_topk(
        keys=keys,
        queries=queries,
        scores=new_scores.copy_(scores),
        ids=new_ids.copy_(ids),
        query_dropped=dropped,
        first_id=first_id,
        **{name: rule.contiguous() if isinstance(rule, Tensor) else rule for name, rule in rules.items()},
        precision=precision,
        delta=delta,
        seed=seed,
        level=chosen.level,
        n_threads=native.n_threads(),
    )
    *found, pass_keys = report
    return new_scores, new_ids, dropped, counts.copy_(torch.tensor([*found, *pass_keys]))


@_whitened_topk.register_fake
def _outputs(
    keys: Tensor,
    queries: Tensor,
    scores: Tensor,
    ids: Tensor,
    first_id: int,
    token_ids: Tensor | None,
    sequence_starts: Tensor | None,
    last_tokens: Tensor | None,
    lookback: Tensor | None,
    window: int,
    indptr: Tensor | None,
    subjects: Tensor | None,
    precision: str,
    delta: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks and allocation, shared by the fake and the kernels.

    Returns scores [S, k] float64, ids [S, k] int64, dropped queries [S] bool, and counts [3 + len(PASSES)] int64: keys
    dropped, the first of them (row number or −1), pairs scored in float64, keys that each pass went over.
    """
    _check_matrices(keys, queries)
    if scores.dim() != 2 or scores.shape != ids.shape or scores.shape[0] != queries.shape[0]:
        raise HparamError(
            f"whitened_topk: the state is {tuple(scores.shape)}, but there are {queries.shape[0]} queries"
        )
    for name, tensor in (("the state", scores), ("token_ids", token_ids), ("indptr", indptr)):
        _check_device(keys, name, tensor)
    return (
        torch.empty(scores.shape, dtype=torch.float64, device=keys.device),
        torch.empty(ids.shape, dtype=torch.int64, device=keys.device),
        torch.empty(queries.shape[:1], dtype=torch.bool, device=keys.device),
        torch.empty(3 + len(PASSES), dtype=torch.int64, device=keys.device),
    )


def _check_matrices(keys: Tensor, queries: Tensor) -> None:
    if keys.dim() != 2 or keys.dtype not in _KEY_DTYPES or keys.shape[1] < 1:
        raise HparamError(
            f"whitened_topk: keys must be (tokens, width) bfloat16|float16|float32, got {_described(keys)}"
        )
    if queries.dim() != 2 or queries.dtype != torch.float32:
        raise HparamError(f"whitened_topk: queries must be (queries, width) float32, got {_described(queries)}")
    if keys.shape[1] != queries.shape[1]:
        raise HparamError(f"whitened_topk: keys are {keys.shape[1]} wide, queries {queries.shape[1]}")
    for name, matrix in (("keys", keys), ("queries", queries)):
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise HparamError(
                f"whitened_topk: columns of {name} must be contiguous, got stride {matrix.stride(1)}; "
                f"call .contiguous()"
            )
    _check_device(keys, "queries", queries)


def _check_device(keys: Tensor, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.device != keys.device:
        raise HparamError(f"whitened_topk: keys are on {keys.device}, {name} on {tensor.device}")


def _check_options(k: int, first_id: int, precision: str, nonfinite: str, delta: float, seed: int) -> None:
    if k < 1:
        raise HparamError(f"whitened_topk: k must be at least 1, got {k}")
    if first_id < 0:
        raise HparamError(f"whitened_topk: first_id must be at least 0, got {first_id}")
    if precision not in PRECISIONS:
        raise HparamError(f"whitened_topk: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if nonfinite not in NONFINITE:
        raise HparamError(f"whitened_topk: nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}")
    if not 0 < delta < 1:
        raise HparamError(f"whitened_topk: delta must lie between 0 and 1, got {delta}")
    if not 0 <= seed < 2**63:
        raise HparamError(f"whitened_topk: seed must lie in [0, 2**63), got {seed}")


def _check_pass(precision: str, keys: Tensor, body: str) -> None:
    needs = ""
    if precision.startswith("bf16") and (keys.dtype != torch.bfloat16 or body != _DOT_BODY):
        needs = "bfloat16 keys and a processor with AVX-512 BF16"
    if precision == "int8" and (keys.shape[1] > _LARGEST_INT8_WIDTH or body != _DOT_BODY):
        needs = f"keys at most {_LARGEST_INT8_WIDTH} wide and a processor with AVX-512 BF16 and VNNI"
    if needs:
        raise BackendError(
            f"whitened_topk: precision {precision!r} needs {needs}, here are "
            f"{str(keys.dtype).removeprefix('torch.')} keys and body {body}; use precision='auto'"
        )


def _sums(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _check_finite(n_nonfinite: int, first_row: int, first_id: int, dropped: Tensor) -> None:
    remedy = "fix the input or pass nonfinite='exclude'"
    if n_nonfinite:
        raise NonFiniteError(
            f"whitened_topk: keys hold a NaN or infinity in row {first_row} (id {first_id + first_row}); {remedy}"
        )
    if bool(dropped.any()):
        row = int(dropped.nonzero()[0])
        raise NonFiniteError(f"whitened_topk: queries hold a NaN or infinity in row {row}; {remedy}")


def _check_int64(owner: str, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and (tensor.dim() != 1 or tensor.dtype != torch.int64):
        raise HparamError(f"{owner}: {name} must be one-dimensional int64, got {_described(tensor)}")


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
