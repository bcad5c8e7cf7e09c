"""Which pairs of a collision scan must not be hits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rep_fast.errors import HparamError


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

    def to(self, device: torch.device) -> LastTokenExclusion:
        """The same rule on `device`; what was checked here is not read back from there."""
        moved = object.__new__(LastTokenExclusion)
        for name in ("token_ids", "sequence_starts", "last_tokens", "lookback"):
            tensor = getattr(self, name)
            object.__setattr__(moved, name, None if tensor is None else tensor.to(device, non_blocking=True))
        object.__setattr__(moved, "window", self.window)
        return moved

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


def _check_int64(owner: str, name: str, tensor: Tensor | None) -> None:
    if tensor is not None and (tensor.dim() != 1 or tensor.dtype != torch.int64):
        raise HparamError(f"{owner}: {name} must be one-dimensional int64, got {described(tensor)}")


def described(tensor: Tensor) -> str:
    """Shape and dtype, as errors show them."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
