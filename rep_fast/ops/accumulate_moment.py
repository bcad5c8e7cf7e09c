"""Second moments of keys, summed block by block.

C = E[k kᵀ] is the statistic behind every closed-form editor (ROME, MEMIT). A float32 running sum over 1e8 tokens loses
digits, so blocks of tokens are multiplied in float32 and their products are added in float64. On a GPU 16-bit keys have
a kernel, other keys are torch's, and the numbers of tokens stay there until a sum is read: nothing waits for a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, library

from rep_fast.errors import BackendError, HparamError, NonFiniteError, SingularMomentError
from rep_fast.ops import native
from rep_fast.ops.backend import Backend, choose, choose_or_warn
from rep_fast.ops.finite import is_finite
from rep_fast.ops.gate_gradient import dense_rows
from rep_fast.ops.moment_on_gpu import UnreadTokens, accumulate_on_gpu, count_tokens
from rep_fast.ops.profile import recorded
from rep_fast.ops.tf32 import is_tf32_allowed

# rows the torch body multiplies in float32 before it adds the product in float64: the error of one entry is at most
# BLOCK_ROWS · 2⁻²⁴ · Σ|k_i k_j|, while one pass over the float64 sum is paid once per block. The native bodies add 64
# rows in a chain, and go over the sum once per 2048; on a GPU once per 4096, with the bound of its kernel's header.
BLOCK_ROWS = 1024
PRECISIONS = ("auto", "fp32", "bf16")
_NAME = "accumulate_moment"
_KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class MomentSum:
    """Running Σ k kᵀ over tokens: float64 lower triangle and token count.

    Merging is exactly commutative and associative up to float64 rounding, so processes and machines combine their
    shards in any order. On a GPU everything but `lower` waits for the device when it is read.

    Attributes:
        lower: [M, M] float64; entries above the diagonal are not used.
        count: tokens added.
        n_nonfinite: tokens left out because they held a NaN or infinity (`nonfinite="exclude"`).

    Raises:
        NonFiniteError: on a GPU, when read: a NaN or infinity in a token that counted, which was left out.
    """

    def __init__(self, lower: Tensor, count: int = 0, n_nonfinite: int = 0) -> None:
        self.lower = lower
        self._count, self._n_nonfinite = count, n_nonfinite
        self._unread: list[tuple[Tensor, bool]] = []
        self._refused: str | None = None

    @property
    def count(self) -> int:
        """Tokens added."""
        self.settle()
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        self.settle()
        self._count = count

    @property
    def n_nonfinite(self) -> int:
        """Tokens left out."""
        self.settle()
        return self._n_nonfinite

    @n_nonfinite.setter
    def n_nonfinite(self, n_nonfinite: int) -> None:
        self.settle()
        self._n_nonfinite = n_nonfinite

    def count_later(self, numbers: Tensor, *, refuses_nonfinite: bool) -> None:
        """Tokens were added to `lower`; the device knows `numbers` [3] of them, see `UnreadTokens`."""
        self._unread.append((numbers, refuses_nonfinite))

    def settle(self) -> None:
        """Read the numbers that are still on the device, in one copy.

        Raises:
            NonFiniteError: there was a NaN or infinity; it is raised again by every later reading.
        """
        if self._unread:
            numbers = torch.stack([own for own, _ in self._unread]).tolist()
            rules, self._unread = [refuses for _, refuses in self._unread], []
            for (counted, nonfinite, first), refuses in zip(numbers, rules, strict=True):
                self._count += counted
                if nonfinite and refuses:
                    self._refused = self._refused or _nonfinite_message(first)
                else:
                    self._n_nonfinite += nonfinite
        if self._refused is not None:
            raise NonFiniteError(self._refused)

    @classmethod
    def zeros(cls, key_dim: int, *, device: torch.device | str | None = None) -> MomentSum:
        """Empty sum for keys of width `key_dim`."""
        if key_dim < 1:
            raise HparamError(f"MomentSum: key width must be at least 1, got {key_dim}")
        lower = torch.zeros(key_dim, key_dim, dtype=torch.float64, device=device)
        chosen = choose(_NAME, lower.device)
        if chosen.module is not None and not chosen.is_cuda:
            chosen.module.prefer_huge_pages(lower)
        return cls(lower)

    @property
    def key_dim(self) -> int:
        """M, the key width."""
        return self.lower.shape[0]

    def second_moment(self) -> Tensor:
        """C = Σ k kᵀ / count, [M, M] float64, exactly symmetric.

        Raises:
            SingularMomentError: no token was added yet.
        """
        if self.count == 0:
            raise SingularMomentError("second moment over 0 tokens is undefined; add keys before asking for it")
        moment = self.lower.tril() / self.count
        return moment + moment.tril(-1).T

    def merge(self, other: MomentSum) -> MomentSum:
        """Sum over the tokens of both; neither is changed."""
        if other.key_dim != self.key_dim:
            raise HparamError(f"MomentSum.merge: key widths differ, {self.key_dim} and {other.key_dim}")
        lower = self.lower + other.lower.to(self.lower.device)
        return MomentSum(lower, self.count + other.count, self.n_nonfinite + other.n_nonfinite)

    def to_tensors(self) -> dict[str, Tensor]:
        """Plain tensors for a safetensors file: `lower` [M, M] float64, `counts` [2] int64."""
        counts = torch.tensor([self.count, self.n_nonfinite], dtype=torch.int64)
        return {"lower": self.lower.tril(), "counts": counts}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> MomentSum:
        """Inverse of `to_tensors`."""
        if set(tensors) != {"lower", "counts"}:
            raise HparamError(f"MomentSum: needs the tensors lower and counts, got {sorted(tensors)}")
        lower, counts = tensors["lower"], tensors["counts"]
        if lower.dim() != 2 or lower.shape[0] != lower.shape[1] or lower.dtype != torch.float64 or counts.shape != (2,):
            raise HparamError(
                f"MomentSum: lower must be (M, M) float64 and counts (2,), got {tuple(lower.shape)} {lower.dtype}"
                f" and {tuple(counts.shape)}"
            )
        count, n_nonfinite = counts.tolist()
        return cls(lower.clone(), count, n_nonfinite)


def accumulate_moment(
    total: MomentSum, keys: Tensor, *, mask: Tensor | None = None, nonfinite: str = "raise", precision: str = "auto"
) -> MomentSum:
    """Add the keys of some tokens to a running second moment.

    total.lower += tril(Σ_t k_t k_tᵀ), total.count += T (statistics of ROME/MEMIT, methods §4): float32 products over
    blocks of tokens, float64 between blocks; float64 keys are multiplied in float64. Products of float32
    entries beyond about 1e17 overflow, and of those below 1e-19 vanish: scale such keys, or pass them as float64.

    Args:
        total: changed in place.
        keys: [T, M] float32, bfloat16, float16 or float64 on total's device; rows may be padded, T may be 0.
        mask: [T] bool, True for tokens that count; default all.
        nonfinite: "raise", or "exclude" to leave such tokens out and count them in `total.n_nonfinite`.
        precision: "auto", or whose multiply-adds: "fp32", or "bf16" for bfloat16 keys on a processor with AVX-512 BF16.
            Products of bfloat16 are exact in both, only subnormal keys count as zero in the second; "auto" takes the
            faster, as measured once per process.
    Returns:
        `total`.
    Raises:
        HparamError: shapes, dtypes or devices do not fit, or an option is unknown.
        BackendError: precision "bf16" where there are no such products.
        NonFiniteError: a NaN or infinity in a token that counts; `total` is then unchanged. On a GPU it is raised when
            the sum is read, see `MomentSum`.
    """
    _check(total, keys, mask, nonfinite, precision)
    if keys.device.type != "cpu" or _body(keys).is_cuda:
        unread = _tokens_on_device(keys.detach(), mask)
        torch.ops.rep_fast.accumulate_moment(total.lower, unread.rows, precision, unread.counts)
        total.count_later(unread.numbers, refuses_nonfinite=nonfinite == "raise")
        return total
    tokens = _tokens_that_count(keys.detach(), mask)
    if tokens.n_nonfinite:
        if nonfinite == "raise":
            raise NonFiniteError(_nonfinite_message(tokens.first_nonfinite))
        total.n_nonfinite += tokens.n_nonfinite
    if len(tokens.rows):
        torch.ops.rep_fast.accumulate_moment(total.lower, tokens.rows, precision)
    total.count += len(tokens.rows)
    return total


class _Tokens(NamedTuple):
    """The rows that count, how many of the mask hold a NaN or infinity, and which is the first of those."""

    rows: Tensor
    n_nonfinite: int = 0
    first_nonfinite: int = -1


def _tokens_that_count(keys: Tensor, mask: Tensor | None) -> _Tokens:
    rows = keys if mask is None else keys[mask]
    if is_finite(rows):
        return _Tokens(rows)
    finite = torch.isfinite(rows).all(dim=1)
    first = int((~finite).nonzero()[0])
    if mask is not None:
        first = int(mask.nonzero()[first])
    rows = rows[finite]
    return _Tokens(rows, len(finite) - len(rows), first)


def _tokens_on_device(keys: Tensor, mask: Tensor | None) -> UnreadTokens:
    chosen = _body(keys)
    if chosen.module is not None:
        keys = dense_rows(keys)
        return UnreadTokens(keys, *count_tokens(chosen.module, keys, mask))
    finite = torch.isfinite(keys).all(dim=1)
    masked = torch.ones_like(finite) if mask is None else mask.to(keys.device)
    bad = ~finite & masked
    counts = finite & masked
    numbers = torch.stack([counts.sum(), bad.sum(), bad.long().argmax() if len(keys) else bad.sum()])
    return UnreadTokens(keys, counts, numbers)


def _nonfinite_message(row: int) -> str:
    return f"accumulate_moment: keys hold a NaN or infinity in row {row}; fix them or pass nonfinite='exclude'"


def _body(keys: Tensor) -> Backend:
    if keys.dtype == torch.float64:
        return Backend("reference", "float64 products are torch's")
    chosen = choose_or_warn(_NAME, keys.device)
    if chosen.is_cuda and keys.dtype == torch.float32:
        return Backend("reference", "float32 products on a GPU are torch's")
    return chosen


def _check(total: MomentSum, keys: Tensor, mask: Tensor | None, nonfinite: str, precision: str) -> None:
    if precision not in PRECISIONS:
        raise HparamError(f"accumulate_moment: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if nonfinite not in ("raise", "exclude"):
        raise HparamError(f"accumulate_moment: nonfinite must be 'raise' or 'exclude', got {nonfinite!r}")
    _check_shapes(total.lower, keys)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != keys.shape[:1]):
        raise HparamError(
            f"accumulate_moment: mask must be ({keys.shape[0]},) bool, got {tuple(mask.shape)} {mask.dtype}"
        )


def _check_shapes(lower: Tensor, keys: Tensor) -> None:
    if keys.dim() != 2 or keys.dtype not in _KEY_DTYPES:
        raise HparamError(
            "accumulate_moment: keys must be (tokens, width) float32|bfloat16|float16|float64,"
            f" got {tuple(keys.shape)} {keys.dtype}"
        )
    if keys.shape[1] != lower.shape[0]:
        raise HparamError(f"accumulate_moment: keys are {keys.shape[1]} wide, the sum is {lower.shape[0]} wide")
    if keys.device != lower.device:
        raise HparamError(f"accumulate_moment: keys are on {keys.device}, the sum is on {lower.device}")


@library.custom_op("rep_fast::accumulate_moment", mutates_args=("lower",))
def _accumulate_moment(lower: Tensor, keys: Tensor, precision: str, counts: Tensor | None = None) -> None:
    _check_shapes(lower, keys)
    T, M = keys.shape
    is_double = keys.dtype == torch.float64 or is_tf32_allowed(keys.device)
    chosen = _body(keys)
    if precision == "bf16" and (chosen.name != "native-avx512_bf16" or keys.dtype != torch.bfloat16):
        raise BackendError(
            "accumulate_moment: precision 'bf16' needs bfloat16 keys and a processor with AVX-512 BF16;"
            " use precision='auto'"
        )
    traffic = keys.nbytes + M * (M + 1) * lower.itemsize
    with recorded(_NAME, chosen.name, flops=T * M * (M + 1), bytes=traffic, device=keys.device):
        if chosen.module is not None and chosen.is_cuda and lower.stride(1) == 1:
            accumulate_on_gpu(chosen.module, lower, dense_rows(keys), counts)
            return
        if counts is not None:  # rows of zeros add nothing, and are not cut out: that would wait for a device
            keys = torch.where(counts[:, None], keys, 0)
        if chosen.module is not None and not chosen.is_cuda and lower.stride(1) == 1:
            chosen.module.accumulate_moment(dense_rows(keys), lower, precision, chosen.level, native.n_threads())
            return
        for block in keys.split(BLOCK_ROWS):
            rows = block.to(torch.float64 if is_double else torch.float32)
            lower += (rows.T @ rows).tril_()


@_accumulate_moment.register_fake
def _(lower: Tensor, keys: Tensor, precision: str, counts: Tensor | None = None) -> None:
    _check_shapes(lower, keys)
