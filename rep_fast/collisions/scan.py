"""Which places of a corpus an edit would also answer to: the keys most similar to its own, whitened (methods §12.2).

An edit with key k* adds to every key k the share ρ = β(k, k*)/β(k*, k*) of what it writes at k* (transfer law, methods
§11). The scan streams a corpus through the layers below the edit and keeps, for many subjects at once, the largest β.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rep_fast import ops
from rep_fast.collisions.query import Query, WhitenedQueries, subject_queries, whiten_queries
from rep_fast.collisions.token_blocks import TokenBlocks, token_blocks
from rep_fast.errors import HparamError
from rep_fast.facts import Fact, TextSource
from rep_fast.models import EditableLM
from rep_fast.stats import SecondMoments

PREFIX_TOKENS = 20
FOLLOWING_TOKENS = 10
_RUN = 64
# of batches on a GPU whose hits are looked at together, since looking waits for the device
TOKENS_BETWEEN_READS = 1 << 17
_CUT = "\ufffd"  # what tokenizers decode a part of a character to


@dataclass(frozen=True)
class Collision:
    """A corpus token whose key resembles an edit's key.

    Attributes:
        subject: whose edit.
        score: β(k, k*) = kᵀC⁻¹k*, C the mean second moment.
        rho: β(k, k*)/β(k*, k*), the share of the edit that is retrieved there.
        corpus_position: token number in the corpus.
        prefix_text: up to 20 tokens before the hit inside its block, and the hit.
        hit_token: text of the token itself as it stands there, the end of `prefix_text`: it may be a piece of a word;
            of a token that holds a part of a character, the whole character.
        following_text: up to 10 tokens after the hit inside its block; both texts together are the decoded tokens.
    """

    subject: str
    score: float
    rho: float
    corpus_position: int
    prefix_text: str
    hit_token: str
    following_text: str = ""


@dataclass
class ScanState:
    """What a scan has found so far; states of disjoint parts of a corpus merge into the state of the whole.

    Attributes:
        hits: running best of every query, ids are corpus positions.
        contexts: corpus position → ids of the tokens up to and with that hit, and of those after it.
        key_sum: [M] float64, sum of all keys seen.
        n_tokens: how many.
    """

    hits: ops.TopK
    contexts: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    key_sum: Tensor | None = None
    n_tokens: int = 0
    _unread: list[TokenBlocks] = field(default_factory=list, repr=False)

    def merge(self, other: ScanState) -> ScanState:
        """The state of both parts together."""
        self.settle()
        other.settle()
        hits = self.hits.merge(other.hits)
        sums = [own for own in (self.key_sum, other.key_sum) if own is not None]
        merged = ScanState(
            hits,
            {**self.contexts, **other.contexts},
            torch.stack(sums).sum(0) if sums else None,
            self.n_tokens + other.n_tokens,
        )
        merged._forget()
        return merged

    def add(self, queries: WhitenedQueries, blocks: TokenBlocks, keys: Tensor, *, window: int, precision: str) -> None:
        """Take in the keys [N, M] of consecutive blocks; `settle` when there are no more."""
        exclusion = queries.exclusion(blocks.token_ids, blocks.starts, window).to(keys.device)
        self.hits = ops.whitened_topk(
            keys,
            queries.for_scan,
            self.hits.k,
            exclusion=exclusion,
            state=self.hits,
            first_id=blocks.first_position,
            precision=precision,
        )
        total = _sum_of_rows(keys)
        self.key_sum = total if self.key_sum is None else self.key_sum + total
        self.n_tokens += len(keys)
        self._unread.append(blocks)
        if keys.device.type == "cpu" or sum(len(own.token_ids) for own in self._unread) >= TOKENS_BETWEEN_READS:
            self.settle()

    def settle(self) -> None:
        """Look at the hits among the batches taken in since the last time and keep their surroundings."""
        if self._unread:
            hits = self.hits.ids.cpu()
            for blocks in self._unread:
                self._remember(blocks, hits)
        self._unread = []

    def _remember(self, blocks: TokenBlocks, hits: Tensor) -> None:
        """Keep the surroundings of new hits now, while their tokens are at hand."""
        ids = blocks.token_ids.tolist()
        borders = [*blocks.starts.tolist(), len(ids)]
        rows = hits - blocks.first_position
        for row in set(rows[(rows >= 0) & (rows < len(ids))].tolist()):
            block = bisect_right(borders, row)
            begin, end = max(borders[block - 1], row - PREFIX_TOKENS), min(borders[block], row + 1 + FOLLOWING_TOKENS)
            self.contexts[blocks.first_position + row] = (tuple(ids[begin : row + 1]), tuple(ids[row + 1 : end]))
        if len(self.contexts) > 2 * hits.numel():  # going through all hits of every batch would cost more
            self._forget()

    def _forget(self) -> None:
        standing = self._positions()
        self.contexts = {position: ids for position, ids in self.contexts.items() if position in standing}

    def _positions(self) -> set[int]:
        return {position for position in self.hits.ids.flatten().tolist() if position >= 0}


@dataclass(frozen=True)
class ScanResult:
    """Collisions of every query with a corpus.

    Attributes:
        collisions: per query, best first; fewer than asked for where the corpus is short.
        baseline: [S] float64, mean score of all corpus keys, what a random key scores.
        self_similarity: [S] float64, β(k*, k*).
        n_tokens: corpus tokens scanned.
        layer: where.
    """

    collisions: tuple[tuple[Collision, ...], ...]
    baseline: Tensor
    self_similarity: Tensor
    n_tokens: int
    layer: int

    @property
    def scores(self) -> Tensor:
        """All collisions' scores in one row, for a histogram, float64."""
        return torch.tensor([hit.score for own in self.collisions for hit in own], dtype=torch.float64)

    @property
    def rhos(self) -> Tensor:
        """All collisions' ρ in one row, for a histogram, float64."""
        return torch.tensor([hit.rho for own in self.collisions for hit in own], dtype=torch.float64)


def scan(
    lm: EditableLM,
    facts: Sequence[Fact] | Sequence[Query],
    corpus: TextSource,
    moments: SecondMoments,
    layer: int,
    *,
    top: int = 10,
    window: int = 10,
    tokens: int | None = None,
    block: int | None = None,
    rows: int = 8,
    precision: str = "auto",
    progress: Callable[[int, int | None], None] | None = None,
) -> ScanResult:
    """The `top` corpus tokens whose keys are most similar to each fact's key.

    Tokens where the subject's last token stands at p, p−1, … or p−window of the same block are its own and left out.

    Args:
        facts: facts (their bare prompt's subject-last key is the query) or ready queries.
        tokens: scan only the first so many corpus tokens.
        block: tokens per block, default the smaller of 1024 and the model's context. rows: blocks per forward pass.
        precision: of the scores, see `ops.whitened_topk`.
        progress: called as progress(tokens done, tokens wanted or None).
    Raises:
        HparamError: no facts, or top, window, tokens or block out of range.
        LayerError, FingerprintError: the moments do not fit model and layer.
        TextSourceError: the corpus is empty.
    """
    lm.check_layer(layer)
    if top < 1 or window < 0 or not facts:
        raise HparamError(f"top={top}, window={window}, {len(facts)} facts: needs top >= 1, window >= 0 and a fact")
    queries = whiten_queries(lm, as_queries(lm, facts, layer), moments, layer)
    state = scan_blocks(
        lm,
        queries,
        corpus,
        layer,
        top=top,
        window=window,
        tokens=tokens,
        block=block,
        rows=rows,
        precision=precision,
        progress=progress,
    )
    return scan_result(lm, queries, state, layer)


def scan_blocks(
    lm: EditableLM,
    queries: WhitenedQueries,
    corpus: TextSource,
    layer: int,
    *,
    top: int = 10,
    window: int = 10,
    tokens: int | None = None,
    block: int | None = None,
    rows: int = 8,
    shard: tuple[int, int] = (0, 1),
    precision: str = "auto",
    progress: Callable[[int, int | None], None] | None = None,
) -> ScanState:
    """The map step: scan every n-th batch of blocks, `shard` = (i, n); `ScanState.merge` is the reduce step."""
    number, n_shards = shard
    if not 0 <= number < n_shards:
        raise HparamError(f"shard={shard} is out of range; give (i, n) with 0 <= i < n")
    device = lm.layer_device(layer)
    state = ScanState(ops.TopK.empty(len(queries.subjects), top, device=device))
    for index, blocks in enumerate(token_blocks(lm, corpus, block=block, tokens=tokens, rows=rows)):
        if index % n_shards != number:
            continue
        keys = lm.keys(blocks.batch, [layer])[layer]
        # on a GPU a bfloat16 model's keys as it made them: one product instead of three
        is_narrow = keys.is_cuda and lm.down_weight(layer).dtype == torch.bfloat16
        keys = keys.bfloat16() if is_narrow else keys.float()
        state.add(queries, blocks, keys, window=window, precision=precision)
        if progress is not None:
            progress(state.n_tokens, tokens)
    state.settle()
    return state


def scan_result(lm: EditableLM, queries: WhitenedQueries, state: ScanState, layer: int) -> ScanResult:
    """Put names, texts and ρ to the numbers of a finished scan."""
    found = []
    ids, scores = state.hits.ids.tolist(), state.hits.exact_scores.tolist()
    for row, (subject, own) in enumerate(zip(queries.subjects, queries.self_similarity.tolist(), strict=True)):
        hits = [(p, s) for p, s in zip(ids[row], scores[row], strict=True) if p >= 0]
        found.append(tuple(_collision(lm, subject, own, *state.contexts[p], p, s) for p, s in hits))
    width = queries.whitened.shape[1]
    key_sum = torch.zeros(width, dtype=torch.float64) if state.key_sum is None else state.key_sum.cpu()
    return ScanResult(
        collisions=tuple(found),
        baseline=queries.whitened.double().cpu() @ key_sum / max(state.n_tokens, 1),
        self_similarity=queries.self_similarity,
        n_tokens=state.n_tokens,
        layer=layer,
    )


def as_queries(lm: EditableLM, facts: Sequence[Fact] | Sequence[Query], layer: int) -> list[Query]:
    """Queries as they are, facts turned into queries."""
    plain = [item for item in facts if isinstance(item, Fact)]
    made = iter(subject_queries(lm, plain, layer) if plain else [])
    return [next(made) if isinstance(item, Fact) else item for item in facts]


def _collision(
    lm: EditableLM,
    subject: str,
    self_similarity: float,
    prefix: Sequence[int],
    following: Sequence[int],
    position: int,
    score: float,
) -> Collision:
    text, begin, end = _text_around(lm, prefix, following)
    return Collision(
        subject=subject,
        score=score,
        rho=score / self_similarity,
        corpus_position=position,
        prefix_text=text[:end],
        hit_token=text[begin:end],
        following_text=text[end:],
    )


def _text_around(lm: EditableLM, prefix: Sequence[int], following: Sequence[int]) -> tuple[str, int, int]:
    """The tokens as one text and where in it the last token of `prefix` begins and ends, to whole characters.

    Decoded from the same beginning each time: alone, tokens of some kinds lose their blank.
    """
    text, with_hit, without = (lm.tokenizer.decode([*ids]) for ids in ((*prefix, *following), prefix, prefix[:-1]))
    begin, end = _shared_length(text, without), _shared_length(text, with_hit)
    if with_hit[end:].startswith(_CUT):  # the character there needs the following tokens
        end += 1
    if begin == end:  # the text ends inside a character, of which the hit is not the first part
        begin = _shared_length(text, without.rstrip(_CUT))
    return text, begin, end


def _sum_of_rows(keys: Tensor) -> Tensor:
    """[M] float64; runs of rows are added in float32, torch's own mixed sum is ten times slower."""
    whole = len(keys) // _RUN * _RUN
    runs = keys[:whole].reshape(-1, _RUN, keys.shape[1]).sum(1)
    return torch.cat([runs, keys[whole:]]).sum(0, dtype=torch.float64)


def _shared_length(text: str, other: str) -> int:
    differing = (place for place, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    return next(differing, min(len(text), len(other)))
