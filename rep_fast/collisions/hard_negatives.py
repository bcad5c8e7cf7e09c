"""Keys an adapter must leave alone although they resemble the edited one: drawn from one sample of a corpus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rep_fast import ops
from rep_fast.collisions.query import WhitenedQueries
from rep_fast.collisions.token_blocks import token_blocks
from rep_fast.errors import HparamError
from rep_fast.facts import TextSource
from rep_fast.models import EditableLM


@dataclass(frozen=True)
class CorpusSample:
    """Keys of one layer over a piece of corpus, collected once and shared by many edits.

    Attributes:
        layer: 0-based.
        keys: [N, M] float32.
        token_ids: [N] int64.
        starts: [Q] int64, rows where a block begins.
    """

    layer: int
    keys: Tensor
    token_ids: Tensor
    starts: Tensor

    @classmethod
    def collect(
        cls,
        lm: EditableLM,
        corpus: TextSource,
        layer: int,
        *,
        tokens: int = 20_000,
        block: int | None = None,
        rows: int = 8,
    ) -> CorpusSample:
        """Keys of the corpus' first `tokens` tokens at one layer.

        Raises:
            LayerError: no such layer. TextSourceError: the corpus is empty. HparamError: a size is out of range.
        """
        lm.check_layer(layer)
        keys, ids, starts, seen = [], [], [], 0
        for blocks in token_blocks(lm, corpus, block=block, tokens=tokens, rows=rows):
            keys.append(lm.keys(blocks.batch, [layer])[layer].float())
            ids.append(blocks.token_ids)
            starts.append(blocks.starts + seen)
            seen += len(blocks.token_ids)
        device = keys[0].device
        return cls(layer, torch.cat(keys), torch.cat(ids).to(device), torch.cat(starts).to(device))

    def split(self, n: int) -> tuple[CorpusSample, CorpusSample]:
        """The first `n` tokens and the rest, each a sample of its own."""
        first = CorpusSample(self.layer, self.keys[:n], self.token_ids[:n], self.starts[self.starts < n])
        later = self.starts[self.starts > n] - n
        rest = CorpusSample(self.layer, self.keys[n:], self.token_ids[n:], torch.cat([later.new_zeros(1), later]))
        return first, rest

    def random(self, n: int, *, seed: int) -> Tensor:
        """Up to `n` different keys [n, M], the same for the same seed."""
        order = torch.randperm(len(self.keys), generator=torch.Generator().manual_seed(seed))
        return self.keys[order[:n].to(self.keys.device)]


def hard_negatives(
    sample: CorpusSample,
    queries: WhitenedQueries,
    *,
    n: int = 256,
    max_rho: float = 0.9,
    window: int = 10,
    precision: str = "auto",
) -> list[Tensor]:
    """Per query, the `n` sample keys most similar to it that are neither the subject's own nor as good as the edit's.

    Similarity is ρ = β(k, k*)/β(k*, k*); keys with ρ >= `max_rho` are taken for the subject under another name and left
    out, like tokens at and up to `window` tokens after the subject's last token.

    Returns:
        One tensor [<= n, M] float32 per query, most similar first; shorter where the sample has no more.
    Raises:
        HparamError: n or max_rho out of range.
    """
    if n < 1 or max_rho <= 0:
        raise HparamError(f"n={n}, max_rho={max_rho}: needs n >= 1 and max_rho > 0")
    whitened = queries.whitened.to(sample.keys.device)
    limit = (max_rho * queries.self_similarity).to(sample.keys.device)[:, None]
    exclusion = queries.exclusion(sample.token_ids, sample.starts, window)
    wanted = n
    while True:
        found = ops.whitened_topk(
            sample.keys,
            whitened,
            wanted,
            exclusion=exclusion,
            precision=precision,
        )
        usable = (found.ids >= 0) & (found.exact_scores < limit)
        # Rows filled up to the last place may have lost some to the limit: look deeper, at most through the sample.
        short = (usable.sum(1) < n) & (found.ids[:, -1] >= 0)
        if wanted >= len(sample.keys) or not bool(short.any()):
            break
        wanted = min(2 * wanted, len(sample.keys))
    return [sample.keys[ids[use][:n]] for ids, use in zip(found.ids, usable, strict=True)]
