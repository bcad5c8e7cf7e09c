"""A corpus as a stream of equal blocks: the ids of all documents concatenated, cut without overlap (methods §12.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast.errors import HparamError, TextSourceError
from rep_fast.facts import TextSource
from rep_fast.models import Batch, EditableLM

DEFAULT_BLOCK = 1024


@dataclass(frozen=True)
class TokenBlocks:
    """Consecutive blocks of the corpus, one row each; only the corpus' last row may be shorter.

    Attributes:
        first_position: corpus position of the first token.
        token_ids: [N] int64, all tokens in order.
        starts: [Q] int64, row numbers in `token_ids` where a block begins; the first is 0.
    """

    first_position: int
    token_ids: Tensor
    starts: Tensor

    @property
    def batch(self) -> Batch:
        """The blocks as rows for the model."""
        ends = [*self.starts.tolist()[1:], len(self.token_ids)]
        ids = self.token_ids.tolist()
        return Batch.from_rows([ids[begin:end] for begin, end in zip(self.starts.tolist(), ends, strict=True)])


def block_length(lm: EditableLM, block: int | None) -> int:
    """`block` checked against the model's context; None takes the smaller of 1024 and the context.

    Raises:
        HparamError: below 1 or longer than the context.
    """
    context = getattr(lm.config, "max_position_embeddings", None) or DEFAULT_BLOCK
    if block is None:
        return min(DEFAULT_BLOCK, context)
    if not 1 <= block <= context:
        raise HparamError(f"block={block} is out of range; choose 1 to {context}, the context of {lm.name!r}")
    return block


def token_blocks(
    lm: EditableLM,
    corpus: TextSource,
    *,
    block: int | None = None,
    tokens: int | None = None,
    rows: int = 8,
) -> Iterator[TokenBlocks]:
    """The corpus in batches of `rows` blocks; with `tokens`, its first `tokens` tokens only.

    Documents carry the special tokens their tokenizer adds to any text.

    Raises:
        HparamError: block, tokens or rows out of range.
        TextSourceError: the corpus holds no token.
    """
    length = block_length(lm, block)
    if rows < 1 or (tokens is not None and tokens < 1):
        raise HparamError(f"rows={rows}, tokens={tokens} are out of range; both must be at least 1")
    limit = tokens if tokens is not None else float("inf")
    waiting: list[int] = []
    position = 0
    for document in corpus:
        waiting += lm.tokenizer(document)["input_ids"]
        while len(waiting) >= rows * length and position + rows * length <= limit:
            yield _cut(waiting[: rows * length], position, length)
            del waiting[: rows * length]
            position += rows * length
        if position + len(waiting) >= limit:
            del waiting[int(limit) - position :]
            break
    if waiting:
        yield _cut(waiting, position, length)
    elif position == 0:
        raise TextSourceError(f"text source {corpus.name!r} holds no tokens; give one with text")


def _cut(ids: list[int], position: int, length: int) -> TokenBlocks:
    return TokenBlocks(position, torch.tensor(ids), torch.arange(0, len(ids), length))
